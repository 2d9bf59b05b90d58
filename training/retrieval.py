"""Does a generated picture look like the right one? Nearest training picture by colour, and a sheet to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image, ImageDraw

from training.captions import plain
from training.data import Pictures, on_colour

STEPS = 20
GUIDANCE = 3.0
POOLED = 32  # pixels, the side pictures are compared at
TILE = 96  # pixels, the side of a picture on the sheet


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread over `count`, the same every time."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int).tolist()


def generate(
    pipeline: PixArtSigmaPipeline, captions: list[str], guidance: float = GUIDANCE, steps: int = STEPS, batch: int = 16
) -> np.ndarray:
    """Pictures (count, 128, 128, 3) uint8; picture i starts from seed i, whatever the batch size."""
    pictures = []
    for start in range(0, len(captions), batch):
        chunk = [plain(caption) for caption in captions[start : start + batch]]
        images = pipeline(
            chunk,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            use_resolution_binning=False,
            clean_caption=False,
            max_sequence_length=32,
            output_type="pil",
        ).images
        pictures += [np.asarray(image) for image in images]
    return np.stack(pictures)


def pooled(pictures: np.ndarray) -> np.ndarray:
    """(count, 128, 128, 3) uint8 to (count, 32 * 32 * 3) in [0, 1], each value the mean over an area."""
    count, height, width, _ = pictures.shape
    blocks = pictures.reshape(count, POOLED, height // POOLED, POOLED, width // POOLED, 3).astype(np.float32) / 255
    return blocks.mean((2, 4)).reshape(count, -1)


def distance_to(generated: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Euclidean distances (generated, known) between pooled pictures, each (count, 128, 128, 3) uint8."""
    return torch.cdist(torch.from_numpy(pooled(generated)), torch.from_numpy(pooled(known))).numpy()


def rank_of_true(generated: np.ndarray, rgba: np.ndarray, true: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each generated picture the rank of its true one among all pictures (0 is nearest), and the nearest one."""
    distance = distance_to(generated, on_colour(rgba))
    own = distance[np.arange(len(true)), true]
    return (distance < own[:, None]).sum(1), distance.argmin(1)


def sheet(generated: np.ndarray, nearest: np.ndarray, true: list[int], pictures: Pictures, file: Path) -> None:
    """Write a contact sheet, 16 a row: generated over its nearest training picture over the true one, and the name."""
    known = on_colour(pictures.rgba)
    columns, label = min(16, len(true)), 14
    rows = -(-len(true) // columns)
    canvas = Image.new("RGB", (columns * TILE, rows * (3 * TILE + label)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, index in enumerate(true):
        left, top = (i % columns) * TILE, (i // columns) * (3 * TILE + label)
        for k, picture in enumerate((generated[i], known[nearest[i]], known[index])):
            canvas.paste(Image.fromarray(picture).resize((TILE, TILE), Image.LANCZOS), (left, top + k * TILE))
        colour = "green" if nearest[i] == index else "firebrick"
        draw.text((left + 2, top + 3 * TILE + 1), plain(pictures.names[index])[:15], fill=colour)
    canvas.save(file, optimize=True)
