"""Metrics against values known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trdq_core.metrics import finite_mean, latent_sqnr_db, psnr, sqnr_db, ssim
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
