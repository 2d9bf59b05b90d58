"""Picture distances against what is known of them: zero for equals, bounds, order, and KID's statistic by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trdq_core.perceptual import feature_distance, gmsd, kernel_distance, pooled


def pictures(seed: int = 0) -> np.ndarray:
    """Two smooth pictures."""
    waves = np.random.default_rng(seed).uniform(1, 4, (2, 1, 1, 3))
    grid = np.linspace(0, 6, 32)
    values = np.sin(waves * grid[None, :, None, None]) + np.cos(waves * grid[None, None, :, None])
    return (127.5 + 60 * values).astype(np.uint8)


def noisy(sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, sigma, pictures().shape)
    return np.clip(pictures() + noise, 0, 255).astype(np.uint8)


def test_gmsd_is_zero_for_equals_and_grows_with_noise() -> None:
    assert gmsd(pictures(), pictures()).tolist() == [0, 0]
    small, large = gmsd(noisy(3), pictures()), gmsd(noisy(20), pictures())
    assert (small > 0).all()
    assert (small < large).all()
    assert (large < 0.5).all(), "similarities lie between 0 and 1, so their deviation is at most a half"


def test_gmsd_looks_at_gradients_not_at_brightness() -> None:
    darker = (pictures().astype(int) - 7).clip(0).astype(np.uint8)
    assert gmsd(darker[:, 2:-2, 2:-2], pictures()[:, 2:-2, 2:-2]).max() < 0.1 * gmsd(noisy(20), pictures()).min()


def test_gmsd_of_one_edge_by_hand() -> None:
    """One column of bright 2x2 cells: the similarity is (c) / (m^2 + c) where the other picture is flat, else 1."""
    flat, edge = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16, 3), np.uint8)
    edge[:, :, 8:10] = 90
    # Prewitt over 3: beside the column (all rows inside) the magnitude is 90; in it 0, except at the zero padding.
    similarity = np.ones((8, 8))
    across = np.array([[0.0] * 3 + [90, 0, 90] + [0.0] * 2] * 8)
    across[0], across[-1] = across[0] * 2 / 3, across[-1] * 2 / 3
    down = np.zeros((8, 8))
    down[0, 3:6] = down[-1, 3:6] = 30
    similarity = 170 / (across**2 + down**2 + 170)
    assert gmsd(edge, flat)[0] == pytest.approx(similarity.std(), rel=1e-9)


def test_feature_distance_is_scaled_by_position_and_bounded() -> None:
    features = [torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 2, 2, 2)]
    assert feature_distance(features, features).tolist() == [0, 0, 0]
    assert feature_distance([7 * f for f in features], features) == pytest.approx(0, abs=1e-12)
    assert feature_distance([-f for f in features], features) == pytest.approx(4, abs=1e-5)
    turned = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    across = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert feature_distance([turned, turned], [across, turned])[0] == pytest.approx(1), "2 and 0, averaged over stages"


def test_pooled_is_one_vector_a_picture() -> None:
    features = [torch.ones(3, 5, 4, 4), torch.zeros(3, 2, 2, 2)]
    assert pooled(features).tolist() == [[1.0] * 5 + [0.0] * 2] * 3


def test_kernel_distance_by_hand_and_its_expectation() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(count, 4, generator=generator, dtype=torch.float64) + shift

    x, y = draw(5), draw(5)
    mean, deviation = y.mean(0), y.std(0)
    a, b = (x - mean) / deviation, (y - mean) / deviation
    kernel = lambda u, v: (float(u @ v) / 4 + 1) ** 3  # noqa: E731
    terms = [
        kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(a[j], b[i])
        for i in range(5) for j in range(5) if i != j
    ]  # fmt: skip
    assert kernel_distance(x, y) == pytest.approx(sum(terms) / 20)
    same = [kernel_distance(draw(60), draw(60)) for _ in range(40)]
    other = [kernel_distance(draw(60, 0.5), draw(60)) for _ in range(40)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same)), "unbiased: zero on average for equal laws"
    assert np.mean(other) > 5 * abs(np.mean(same))
    assert kernel_distance(x, x) == pytest.approx(0, abs=1e-12), "pairs left out: nothing is below zero by likeness"
