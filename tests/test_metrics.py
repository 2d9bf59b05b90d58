"""Metrics against values known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trdq_core import metrics
from trdq_core.errors import ShapeError
from trdq_core.metrics import (
    compare_clips,
    finite_mean,
    latent_sqnr_db,
    motion_energy,
    motion_ratio,
    psnr,
    sqnr_db,
    ssim,
    temporal_error,
    worst_frame,
)
from trdq_core.sampling import Trajectory


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_equal_pictures() -> None:
    assert math.isinf(psnr(picture(), picture()))
    assert ssim(picture(), picture()) == pytest.approx(1)


def test_psnr_of_a_known_error() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(grey, black) == pytest.approx(20 * math.log10(5))


def test_ssim_falls_with_noise() -> None:
    noisy = np.clip(picture().astype(int) + np.random.default_rng(1).normal(0, 20, (32, 32, 3)), 0, 255).astype(
        np.uint8
    )
    assert ssim(picture(1), picture()) < ssim(noisy, picture()) < 1


def test_sqnr() -> None:
    reference = torch.ones(100)
    assert sqnr_db(reference * 1.1, reference) == pytest.approx(20, abs=1e-4)
    assert math.isinf(sqnr_db(reference, reference))
    runs = [Trajectory([reference, reference * scale], [1.0, 0.0], 0.0) for scale in (1.0, 1.01)]
    assert latent_sqnr_db(runs[1], runs[0])[1] == pytest.approx(40, abs=1e-2)


def test_means_leave_infinities_out() -> None:
    assert finite_mean([1.0, math.inf, 3.0]) == 2.0
    assert finite_mean([math.inf]) is None


def moving_square(step: int = 2) -> np.ndarray:
    """Grey with a lighter square that moves `step` pixels a frame: (6, 32, 32, 3)."""
    clip = np.full((6, 32, 32, 3), 100, np.uint8)
    for number, frame in enumerate(clip):
        frame[10:18, 2 + step * number : 10 + step * number] = 150
    return clip


def test_equal_clips() -> None:
    metrics = compare_clips(moving_square(), moving_square())
    assert all(math.isinf(value) for value in metrics.psnr) and len(metrics.psnr) == 6
    assert metrics.ssim == pytest.approx([1.0] * 6)
    assert (metrics.temporal_error, metrics.motion_ratio, metrics.worst_frame) == (0.0, 1.0, None)


def test_an_error_that_stands_still_is_no_flicker() -> None:
    metrics = compare_clips(moving_square() + np.uint8(10), moving_square())
    assert metrics.psnr == pytest.approx([20 * math.log10(25.5)] * 6)
    assert metrics.temporal_error == 0 and metrics.motion_ratio == pytest.approx(1)


def test_flicker_of_known_size() -> None:
    flickering = moving_square()
    flickering[1::2] += 10  # differences are off by 10 grey levels, up and down in turn
    metrics = compare_clips(flickering, moving_square())
    assert metrics.temporal_error == pytest.approx(10)
    assert metrics.motion_ratio > 1
    assert metrics.worst_frame == 1
    assert [math.isinf(value) for value in metrics.psnr] == [True, False] * 3


def test_motion_that_is_lost_or_halved() -> None:
    still = np.repeat(moving_square()[:1], 6, axis=0)
    assert motion_ratio(still, moving_square()) == 0
    assert motion_ratio(moving_square(), still) is None
    assert motion_ratio(moving_square(1), moving_square(2)) == pytest.approx(0.5)
    # Two columns of 8 rows change by 50 on either side of the square.
    assert motion_energy(moving_square(1)) == pytest.approx(2 * 8 * 50**2 / 32**2)


def test_a_reversed_clip_has_the_energy_but_not_the_motion() -> None:
    backwards = moving_square()[::-1]
    assert motion_ratio(backwards, moving_square()) == pytest.approx(1)
    assert temporal_error(backwards, moving_square()) > 5


def test_the_worst_frame_is_the_first_of_the_lowest() -> None:
    assert worst_frame([30.0, 20.0, math.inf, 20.0]) == 1


def test_clips_of_other_shapes_are_refused_in_one_sentence() -> None:
    with pytest.raises(ShapeError, match=r"got \(5, 32, 32, 3\) beside a reference of \(6, 32, 32, 3\)"):
        compare_clips(moving_square()[:5], moving_square())
    with pytest.raises(ShapeError, match="at least 2 frames"):
        temporal_error(picture(), picture())


def test_likeness_of_a_clip_is_the_mean_over_its_frames() -> None:
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 200, (4, 16, 16, 3), dtype=np.uint8)
    clip = reference.copy()
    clip[1] += 5
    clip[2, :8] += 20
    found = metrics.likeness(clip, reference)
    assert found.clip == metrics.compare_clips(clip, reference)
    assert found.psnr == pytest.approx((found.clip.psnr[1] + found.clip.psnr[2]) / 2), "equal frames are left out"
    assert found.ssim == pytest.approx(sum(found.clip.ssim) / 4)
    assert metrics.likeness(reference, reference).psnr == math.inf
    picture = metrics.likeness(clip[1], reference[1])
    assert picture == (metrics.psnr(clip[1], reference[1]), metrics.ssim(clip[1], reference[1]), None)


def test_fields_of_clips_have_no_infinities() -> None:
    still = np.full((3, 16, 16, 3), 100, np.uint8)
    moved = still.copy()
    moved[2] += 10
    row = metrics.clip_row([metrics.compare_clips(still, still), metrics.compare_clips(moved, still)])
    assert row["frame_psnr"][0] == [None] * 3 and row["frame_psnr"][1][:2] == [None] * 2
    assert row["worst_frame"] == [None, 2]
    assert row["motion_ratio"] == [None, None] and row["motion_ratio_mean"] is None, "the reference stands still"
    assert row["temporal_error"][0] == 0 and row["temporal_error_mean"] == pytest.approx(row["temporal_error"][1] / 2)
