"""Does a generated clip look and move like the right one? Nearest training clip, motion, and a sheet to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import LattePipeline
from PIL import Image, ImageDraw

from training.captions import plain
from training.retrieval import POOLED
from training.video_data import FRAMES, SIZE, Clips

STEPS = 20
GUIDANCE = 3.0
SHOWN = 4  # frames of each clip on the sheet
COLUMNS = 4  # clips in a row of the sheet


def generate(
    pipeline: LattePipeline, captions: list[str], guidance: float = GUIDANCE, steps: int = STEPS
) -> np.ndarray:
    """Clips (count, FRAMES, 64, 64, 3) uint8; clip i starts from seed i.

    One at a time: given several prompts, Latte's pipeline lets them attend to the padding of the longest.
    """
    clips = []
    for number, caption in enumerate(captions):
        frames = pipeline(
            plain(caption),
            num_inference_steps=steps,
            guidance_scale=guidance,
            video_length=FRAMES,
            height=SIZE,
            width=SIZE,
            generator=torch.Generator().manual_seed(number),
            clean_caption=False,
            output_type="pil",
        ).frames[0]
        clips.append(np.stack([np.asarray(frame) for frame in frames]))
    return np.stack(clips)


def pooled(clips: np.ndarray) -> torch.Tensor:
    """(..., frames, 64, 64, 3) uint8 to (clips, frames * 32 * 32 * 3) in [0, 1], each value the mean over an area."""
    *_, frames, height, width, _ = clips.shape
    blocks = clips.reshape(-1, POOLED, height // POOLED, POOLED, width // POOLED, 3).astype(np.float32) / 255
    return torch.from_numpy(blocks.mean((2, 4)).reshape(-1, frames * POOLED * POOLED * 3))


def distance_to(generated: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Distances (generated, known) of clips (count, frames, ...) to known ones (count, windows, frames, ...).

    Euclidean, over the pooled values of all frames; of a known clip's windows the nearest counts.
    """
    count, windows = known.shape[:2]
    distances = torch.cdist(pooled(generated), pooled(known))
    return distances.reshape(len(generated), count, windows).amin(2).numpy()


def rank_of_true(generated: np.ndarray, known: np.ndarray, true: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each generated clip the rank of its true one among all known clips (0 is nearest), and the nearest one."""
    distance = distance_to(generated, known)
    own = distance[np.arange(len(true)), true]
    return (distance < own[:, None]).sum(1), distance.argmin(1)


def change(clips: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring frames, in [0, 1], of each clip (clips, frames, height, width, 3) uint8."""
    differences = np.abs(np.diff(clips.astype(np.float32) / 255, axis=1))
    return differences.mean((1, 2, 3, 4))


def _strip(clip: np.ndarray) -> Image.Image:
    """A few evenly spaced frames side by side."""
    chosen = np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)
    return Image.fromarray(np.concatenate(list(clip[chosen]), axis=1))


def sheet(generated: np.ndarray, nearest: np.ndarray, true: list[int], clips: Clips, file: Path) -> None:
    """Write a contact sheet: four frames generated, above the same frames of the true clip, and the name."""
    label, gap = 14, 6
    width, height = SHOWN * SIZE + gap, 2 * SIZE + label + gap
    canvas = Image.new("RGB", (COLUMNS * width, -(-len(true) // COLUMNS) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, index in enumerate(true):
        left, top = (i % COLUMNS) * width, (i // COLUMNS) * height
        canvas.paste(_strip(generated[i]), (left, top))
        windows = clips.frames[index]
        window = int(torch.cdist(pooled(generated[i : i + 1]), pooled(windows)).argmin())
        canvas.paste(_strip(windows[window]), (left, top + SIZE))
        colour = "green" if nearest[i] == index else "firebrick"
        draw.text((left + 2, top + 2 * SIZE + 1), plain(clips.names[index]), fill=colour)
    canvas.save(file, optimize=True)
