"""Pictures of a run as float arrays, and the signed difference of two of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GAINS = (1, 4, 16)
COOL = np.array([33, 102, 172], dtype=np.float64)  # darker than the left picture
WARM = np.array([178, 24, 43], dtype=np.float64)  # lighter than the left picture
EVEN = np.array([247, 247, 247], dtype=np.float64)
SMALLEST_SHOWN = 384  # pixels: smaller pictures are enlarged without smoothing, so each pixel can be seen


def load(path: Path) -> Image.Image | None:
    """The picture, or nothing if it is missing or damaged."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError):
        return None


def as_floats(picture: Image.Image) -> np.ndarray[Any, Any]:
    """Heights, widths, channels in [0, 1]."""
    return np.asarray(picture, dtype=np.float64) / 255.0


def difference(left: Image.Image, right: Image.Image, gain: int) -> Image.Image | None:
    """Right minus left, mean over the channels, times `gain`, blue where darker and red where lighter; none if sizes differ."""
    if left.size != right.size:
        return None
    signed = np.clip((as_floats(right) - as_floats(left)).mean(axis=2) * gain, -1.0, 1.0)[..., None]
    end = np.where(signed < 0, COOL, WARM)
    colours = EVEN + (end - EVEN) * np.abs(signed)
    return enlarge(Image.fromarray(np.rint(colours).astype(np.uint8)))


def psnr(left: Image.Image, right: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one size; infinite if they are equal."""
    error = float(np.mean((as_floats(left) - as_floats(right)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def enlarge(picture: Image.Image) -> Image.Image:
    """The picture with every pixel repeated until it is large enough to look at."""
    times = max(1, -(-SMALLEST_SHOWN // max(picture.size)))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
