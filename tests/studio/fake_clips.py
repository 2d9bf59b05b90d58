"""Clips as a run of a video model leaves them: real files, made of a disc that moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from trdq_core.video_files import filmstrip, write_mp4, write_png_sequence

FRAMES, SIDE, FPS = 16, 64, 8.0
SHAPE = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": FPS}
BLOCKS = ("attn1.to_q", "ff.net.0.proj")
LAYERS = tuple(
    f"{prefix}transformer_blocks.{block}.{name}"
    for block in range(2)
    for prefix in ("", "temporal_")
    for name in BLOCKS
)
Rows = dict[str, Any]


def frames(recipe: str, noise: float = 0.0) -> np.ndarray:
    """(frames, height, width, 3) uint8; a disc that goes to the right, noisier the coarser the recipe."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    amount = noise + {"fp": 0.0}.get(recipe, 0.03 if recipe.startswith("tr-dq") else 0.08)
    random, clip = np.random.default_rng(7), []
    for index in range(FRAMES):
        disc = ((x - 0.15 - 0.7 * index / FRAMES) ** 2 + (y - 0.5) ** 2 < 0.02)[..., None]
        picture = np.where(disc, np.array([0.85, 0.15, 0.2]), 1 - 0.3 * y[..., None])
        shaken = amount * (2 if index == 5 else 1)
        clip.append(np.clip(picture + shaken * random.normal(size=picture.shape), 0, 1) * 255)
    return np.stack(clip).astype(np.uint8)


def write(folder: Path, recipe: str, prompt: int, video: bool) -> dict[str, str | None]:
    """The files of one clip, and where they lie in the run's folder."""
    name, clip = f"{recipe}_{prompt:03d}", frames(recipe)
    write_png_sequence(folder / "frames" / name, clip)
    image = write_strip(folder, f"images/{name}.png", clip)
    if video:
        write_mp4(folder / "videos" / f"{name}.mp4", clip, FPS)
    return {"video": f"videos/{name}.mp4" if video else None, "frames": f"frames/{name}", "image": image}


def write_strip(folder: Path, relative: str, clip: np.ndarray) -> str:
    """The filmstrip of a clip as a file; its place in the folder."""
    from PIL import Image

    (folder / relative).parent.mkdir(exist_ok=True)
    Image.fromarray(filmstrip(clip)).save(folder / relative)
    return relative


def fields(recipe: str, places: list[dict[str, str | None]]) -> Rows:
    """What the report says of a recipe's clips; curves are measured, SSIM is made up."""
    found: Rows = {"videos": [p["video"] for p in places], "frames": [p["frames"] for p in places]}
    if recipe == "fp":
        return found
    own, reference = frames(recipe).astype(float), frames("fp").astype(float)
    curve = [_psnr(a, b) for a, b in zip(own, reference, strict=True)]
    many = len(places)
    return found | {
        "frame_psnr": [curve] * many, "frame_ssim": [[0.9 - 0.02 * (index == 5) for index in range(FRAMES)]] * many,
        "temporal_error": [3.25] * many, "motion_ratio": [1.125] * many, "worst_frame": [curve.index(min(curve))] * many,
        "temporal_error_mean": 3.25, "motion_ratio_mean": 1.125,
    }  # fmt: skip


def _psnr(left: np.ndarray, right: np.ndarray) -> float:
    return 20 * math.log10(255) - 10 * math.log10(float(np.mean((left - right) ** 2)))
