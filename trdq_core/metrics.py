"""How far a quantized run is from its reference: pictures, clips and latents, from arrays and never from compressed files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from skimage.metrics import structural_similarity
from torch import Tensor

from trdq_core.errors import ShapeError
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


class ClipMetrics(NamedTuple):
    """A clip beside its reference. Curves have one value a frame; infinite PSNR means that the frames are equal."""

    psnr: list[float]  # dB
    ssim: list[float]
    temporal_error: float  # grey levels, see `temporal_error`
    motion_ratio: float | None  # see `motion_ratio`
    worst_frame: int | None  # see `worst_frame`


def compare_clips(clip: np.ndarray, reference: np.ndarray) -> ClipMetrics:
    """Every metric of two clips (frames, height, width, 3) uint8; ShapeError if they differ in shape."""
    _check_clips(clip, reference)
    curve = [psnr(a, b) for a, b in zip(clip, reference, strict=True)]
    return ClipMetrics(
        curve,
        [ssim(a, b) for a, b in zip(clip, reference, strict=True)],
        temporal_error(clip, reference),
        motion_ratio(clip, reference),
        worst_frame(curve),
    )


class Likeness(NamedTuple):
    """How close a picture or a clip is to its reference; infinite PSNR means that they are equal."""

    psnr: float  # dB; of a clip the mean over the frames that differ
    ssim: float  # of a clip the mean over its frames
    clip: ClipMetrics | None  # None for pictures


def likeness(output: np.ndarray, reference: np.ndarray) -> Likeness:
    """What `psnr` and `ssim` say of two pictures (height, width, 3), or `compare_clips` of two clips; all uint8."""
    if output.ndim != 4:
        return Likeness(psnr(output, reference), ssim(output, reference), None)
    found = compare_clips(output, reference)
    mean = finite_mean(found.psnr)
    return Likeness(math.inf if mean is None else mean, sum(found.ssim) / len(found.ssim), found)


def clip_row(clips: Sequence[ClipMetrics]) -> dict[str, Any]:
    """The fields of a report row that only clips have: curves and values of each, and means; infinities become None."""
    ratios = [clip.motion_ratio for clip in clips if clip.motion_ratio is not None]
    return {
        "frame_psnr": [[value if math.isfinite(value) else None for value in clip.psnr] for clip in clips],
        "frame_ssim": [clip.ssim for clip in clips],
        "temporal_error": [clip.temporal_error for clip in clips],
        "motion_ratio": [clip.motion_ratio for clip in clips],
        "worst_frame": [clip.worst_frame for clip in clips],
        "temporal_error_mean": finite_mean([clip.temporal_error for clip in clips]),
        "motion_ratio_mean": finite_mean(ratios),
    }


def temporal_error(clip: np.ndarray, reference: np.ndarray) -> float:
    """Flicker that the reference does not have: RMS of (frame difference of the clip - that of the reference).

    In grey levels from 0 to 255. An error that is the same in every frame counts nothing here, however large it is.
    """
    _check_clips(clip, reference)
    return float(np.sqrt(np.mean((_frame_differences(clip) - _frame_differences(reference)) ** 2)))


def motion_ratio(clip: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean squared frame difference of the clip over that of the reference: below 1 it moves less, above 1 it moves or
    flickers more. None if the reference does not move."""
    _check_clips(clip, reference)
    energy = motion_energy(reference)
    return motion_energy(clip) / energy if energy > 0 else None


def motion_energy(clip: np.ndarray) -> float:
    """Mean squared difference of neighbouring frames of a clip (frames, height, width, 3) uint8, in squared grey levels."""
    return float(np.mean(_frame_differences(clip) ** 2))


def worst_frame(curve: Sequence[float]) -> int | None:
    """The frame where a quality curve is lowest, the first of several; None if every frame equals its reference."""
    return int(np.argmin(curve)) if any(math.isfinite(value) for value in curve) else None


def _frame_differences(clip: np.ndarray) -> np.ndarray:
    return np.diff(clip.astype(np.float64), axis=0)


def _check_clips(clip: np.ndarray, reference: np.ndarray) -> None:
    if clip.shape != reference.shape:
        raise ShapeError(
            f"clips: got {clip.shape} beside a reference of {reference.shape}; compare clips of one model and size."
        )
    if clip.ndim != 4 or len(clip) < 2:
        raise ShapeError(
            f"clips: got an array of {clip.shape}; (frames, height, width, 3) with at least 2 frames is needed."
        )
