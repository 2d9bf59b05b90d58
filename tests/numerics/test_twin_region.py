"""Invariants 11, 12, 14, 21, 22, 25 of the grids with two regions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trdq_core.errors import CalibrationError
from trdq_core.numerics.affine import choose_qparams, fake_quantize
from trdq_core.numerics.twin_region import GELU_MINIMUM, THRESHOLDS, SignGrid, SoftmaxGrid

BITS = (3, 4, 6, 8)


def softmax_rows() -> torch.Tensor:
    logits = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    return logits.softmax(-1)


def gelu_values() -> torch.Tensor:
    return functional.gelu(torch.randn(80, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2)


def mean_square(x: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((rounded - x).square().mean())


def uniform(x: torch.Tensor, bits: int) -> torch.Tensor:
    return fake_quantize(x, choose_qparams(x.min(), x.max(), bits=bits, symmetric=False), bits=bits)


def grids(bits: int) -> list[tuple[SoftmaxGrid | SignGrid, torch.Tensor]]:
    x, y = softmax_rows(), gelu_values()
    return [
        (SoftmaxGrid.fit(x, bits), x),
        *((SoftmaxGrid(t, bits), torch.linspace(0, 1, 3001, dtype=torch.float64)) for t in THRESHOLDS[::3]),
        (SignGrid.fit(y, bits, minimum=GELU_MINIMUM), y),
    ]


@pytest.mark.parametrize("bits", BITS)
def test_invariant_11_quantizing_twice_changes_nothing(bits: int) -> None:
    for grid, x in grids(bits):
        once = grid.fake_quantize(x)
        assert torch.allclose(grid.fake_quantize(once), once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_invariant_12_there_are_at_most_two_to_the_bits_levels(bits: int) -> None:
    for grid, x in grids(bits):
        levels = grid.levels()
        assert len(levels) <= 2**bits
        assert (levels.diff() > 0).all()
        distance = (grid.fake_quantize(x).flatten()[:, None] - levels).abs().amin(1)
        assert distance.max() <= 1e-12


@pytest.mark.parametrize("bits", BITS)
def test_invariant_14_order_is_kept(bits: int) -> None:
    for grid, x in grids(bits):
        assert (grid.fake_quantize(x.flatten().sort().values).diff() >= -1e-15).all()


@pytest.mark.parametrize("bits", BITS)
def test_values_go_to_the_nearest_level_of_their_region(bits: int) -> None:
    for grid, x in grids(bits):
        levels = grid.levels()
        inside = x.flatten().clamp(levels[0], levels[-1])
        nearest = (inside[:, None] - levels).abs().amin(1)
        assert torch.allclose((grid.fake_quantize(inside) - inside).abs(), nearest, atol=1e-12)


@pytest.mark.parametrize("bits", (4, 6, 8))
def test_invariant_21_softmax_values_are_nearer_than_on_a_uniform_grid(bits: int) -> None:
    x = softmax_rows()
    rounded = SoftmaxGrid.fit(x, bits).fake_quantize(x)
    assert rounded.min() >= 0
    assert rounded.max() <= 1
    # A uniform grid of the whole range 0..1, which softmax outputs may fill at any time.
    whole = fake_quantize(
        x, choose_qparams(torch.tensor(0.0), torch.tensor(1.0), bits=bits, symmetric=False), bits=bits
    )
    assert mean_square(x, rounded) <= mean_square(x, whole) / 4


def test_invariant_21_a_threshold_of_one_is_uniform_with_a_bit_less() -> None:
    x = torch.linspace(0, 1, 999, dtype=torch.float64)
    assert torch.allclose(SoftmaxGrid(1.0, 6).fake_quantize(x), (x * 31).round() / 31, atol=1e-12)


@pytest.mark.parametrize("threshold", (0.25, 2.0**-4, 2.0**-8))
def test_invariant_21_large_values_have_no_bias(threshold: float) -> None:
    x = torch.rand(20000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grid = SoftmaxGrid(threshold, 6)
    bias = (grid.fake_quantize(x) - x)[x > threshold].mean()
    assert bias.abs() <= 1 / 31 / 4


def test_invariant_22_the_minimum_is_representable_and_the_steps_are_independent() -> None:
    x = gelu_values()
    for bits in BITS:
        grid = SignGrid.fit(x, bits, minimum=GELU_MINIMUM)
        lowest = torch.tensor([GELU_MINIMUM], dtype=torch.float64)
        assert torch.allclose(grid.fake_quantize(lowest), lowest, rtol=1e-12)
        assert grid.negative_step == pytest.approx(0.16997 / 2 ** (bits - 1))
        larger = SignGrid.fit(torch.where(x > 0, 3 * x, x), bits, minimum=GELU_MINIMUM)
        assert larger.negative_step == grid.negative_step
        assert larger.positive_step == pytest.approx(3 * grid.positive_step, rel=1e-9)


@pytest.mark.parametrize("bits", (4, 6, 8))
def test_invariant_22_values_below_zero_are_far_nearer_than_on_a_uniform_grid(bits: int) -> None:
    """Only those: half of the levels are spent on them, so values above zero have the step of one bit less."""
    x = gelu_values()
    grid = SignGrid.fit(x, bits, minimum=GELU_MINIMUM)
    ours, theirs = grid.fake_quantize(x), uniform(x, bits)
    below = x < 0
    assert mean_square(x[below], ours[below]) < mean_square(x[below], theirs[below]) / 4
    coarser = uniform(x.relu(), bits - 1)
    assert mean_square(x[~below], ours[~below]) <= mean_square(x[~below], coarser[~below]) * (1 + 1e-9)


def test_other_activation_functions_bring_their_own_minimum() -> None:
    silu = functional.silu(torch.linspace(-6, 6, 5001, dtype=torch.float64))
    grid = SignGrid.fit(silu, 6)
    assert grid.negative_step * 32 == pytest.approx(-float(silu.min()))
    assert SignGrid.fit(silu.relu(), 6).fake_quantize(silu.relu()).min() == 0


def test_error_weights_move_the_choice() -> None:
    x = softmax_rows()
    small = (x < 2**-9).double()
    plain, weighted = SoftmaxGrid.fit(x, 6), SoftmaxGrid.fit(x, 6, error_weight=small)
    assert weighted.threshold < plain.threshold


@pytest.mark.parametrize("x", [torch.zeros(4), torch.ones(1), torch.full((3,), 65504.0), torch.full((3,), 1e-30)])
def test_invariant_25_constant_zero_and_huge_values_stay_finite(x: torch.Tensor) -> None:
    for grid in (SignGrid.fit(x, 4), SignGrid.fit(-x, 4), SoftmaxGrid.fit(x.clamp(0, 1), 4)):
        assert torch.isfinite(grid.fake_quantize(x)).all()


def test_nothing_or_nan_to_fit_is_one_sentence() -> None:
    with pytest.raises(CalibrationError, match="softmax: no values were observed"):
        SoftmaxGrid.fit(torch.zeros(0), 8)
    with pytest.raises(CalibrationError, match="activation: its observed values hold NaN"):
        SignGrid.fit(torch.tensor([float("nan")]), 8)
