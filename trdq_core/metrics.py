"""How far a quantized run is from its reference: pictures and latents, from arrays and never from compressed files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from skimage.metrics import structural_similarity
from torch import Tensor

from trdq_core.sampling import Trajectory


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures; infinite if they are equal."""
    error = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures (height, width, 3): Gaussian window of sigma 1.5, as first published."""
    return float(
        structural_similarity(
            picture,
            reference,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def sqnr_db(value: Tensor, reference: Tensor) -> float:
    """Signal over quantization noise in dB; infinite if they are equal."""
    noise = float((value.double() - reference.double()).square().sum())
    signal = float(reference.double().square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)


def latent_sqnr_db(run: Trajectory, reference: Trajectory) -> list[float]:
    """SQNR of the latents after every step, in dB."""
    return [sqnr_db(a, b) for a, b in zip(run.latents, reference.latents, strict=True)]


def finite_mean(values: Sequence[float]) -> float | None:
    """The mean of the finite values, None if there is none."""
    kept = [value for value in values if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else None
