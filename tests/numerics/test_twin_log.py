"""Invariants 11, 12, 14-17, 20, 25 of the twin-log grid, and the two forms of the paper's formula."""

from __future__ import annotations

import pytest
import torch

from trdq_core.numerics.affine import fake_quantize
from trdq_core.numerics.ranges import minmax_range, searched_range
from trdq_core.numerics.twin_log import SMALLEST_GROWTH, TwinLog, fit_twin_log
from trdq_core.numerics.twin_log_offset import twin_log_clean, twin_log_released

BITS = (3, 4)


def heavy_tails(rows: int = 64, columns: int = 512) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.03


def gain_db(x: torch.Tensor, rounded: torch.Tensor, other: torch.Tensor) -> float:
    """How much less error `rounded` has than `other`, in decibels."""
    x = x.double()
    return float(10 * ((other - x).square().sum() / (rounded - x).square().sum()).log10())


def uniform(x: torch.Tensor, bits: int, *, searched: bool) -> torch.Tensor:
    x = x.double()
    found = minmax_range(x)
    if searched:
        found = searched_range(x, found, bits=bits, symmetric=True)
    return fake_quantize(x, found.grid(bits=bits, symmetric=True), bits=bits)


@pytest.mark.parametrize("bits", BITS)
def test_invariant_11_quantizing_twice_changes_nothing(bits: int) -> None:
    x = heavy_tails().double()
    grid = fit_twin_log(x, bits)
    once = grid.fake_quantize(x)
    assert torch.equal(grid.fake_quantize(once), once)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_invariant_12_a_row_has_at_most_two_to_the_bits_levels(bits: int) -> None:
    x = torch.linspace(-1, 1, 4001)[None]
    for rounded in (fit_twin_log(x, bits).fake_quantize(x), twin_log_clean(x, bits)):
        assert rounded.unique().numel() <= 2**bits


def test_the_released_form_has_more_levels_than_its_bits() -> None:
    x = torch.linspace(-1, 1, 4001)[None]
    assert twin_log_released(x, 3).unique().numel() == 9


@pytest.mark.parametrize("bits", BITS)
def test_invariant_14_order_is_kept(bits: int) -> None:
    x = heavy_tails(1, 2000).sort(1).values
    for rounded in (fit_twin_log(x, bits).fake_quantize(x), twin_log_clean(x, bits)):
        assert (rounded.diff() >= 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_invariant_15_scaling_the_input_scales_the_output(bits: int) -> None:
    x = heavy_tails(8, 128)
    for quantizer in (lambda v: fit_twin_log(v, bits).fake_quantize(v.double()), lambda v: twin_log_clean(v, bits)):
        assert torch.allclose(quantizer(8 * x), 8 * quantizer(x), rtol=1e-9, atol=1e-12)
    released = twin_log_released(8 * x, bits) / 8
    assert (released - twin_log_released(x, bits)).abs().max() > 0.01 * x.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_invariant_16_the_grid_is_odd(bits: int) -> None:
    x = heavy_tails(8, 128)
    assert torch.equal(fit_twin_log(-x, bits).fake_quantize(-x), -fit_twin_log(x, bits).fake_quantize(x))
    assert torch.allclose(twin_log_clean(-x, bits), -twin_log_clean(x, bits))


def test_invariant_17_more_bits_never_hurt() -> None:
    x = heavy_tails()
    errors = [float((fit_twin_log(x, bits).fake_quantize(x) - x).square().sum()) for bits in (2, 3, 4, 5, 6)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", BITS)
def test_invariant_20_growth_to_zero_is_the_uniform_grid(bits: int) -> None:
    x = heavy_tails(8, 128).double()
    top = x.abs().amax(1, keepdim=True)
    grid = TwinLog(top, torch.full_like(top, SMALLEST_GROWTH), bits)
    steps = torch.linspace(0, 1, 2 ** (bits - 1), dtype=torch.float64)
    assert torch.allclose(grid.magnitudes(), top * steps, rtol=1e-5)


def test_invariant_20_gaps_grow_by_two_to_the_growth() -> None:
    growth = torch.tensor([[0.02], [0.5], [1.2]], dtype=torch.float64)
    gaps = TwinLog(torch.ones_like(growth), growth, 4).magnitudes().diff(dim=1)
    assert torch.allclose(gaps[:, 1:] / gaps[:, :-1], torch.exp2(growth).expand(3, 6), rtol=1e-10)


@pytest.mark.parametrize("bits", (2, 3, 4, 6))
def test_invariant_20_no_row_is_worse_than_on_a_searched_uniform_grid(bits: int) -> None:
    for x in (heavy_tails(), torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) - 0.5):
        x = x.double()
        ours = (fit_twin_log(x, bits).fake_quantize(x) - x).square().sum(1)
        theirs = (uniform(x, bits, searched=True) - x).square().sum(1)
        assert (ours <= theirs * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_invariant_20_heavy_tails_gain_three_decibels_over_min_max(bits: int) -> None:
    x = heavy_tails()
    ours = fit_twin_log(x, bits).fake_quantize(x.double())
    assert gain_db(x, ours, uniform(x, bits, searched=False)) >= 3
    assert gain_db(x, ours, uniform(x, bits, searched=True)) >= 1


@pytest.mark.parametrize("bits", BITS)
def test_the_papers_formula_over_the_mask_beats_its_release(bits: int) -> None:
    """With weights as small as a transformer's: the released offset is absolute, so it fits only far larger ones."""
    for x in (heavy_tails(16), torch.randn(16, 512, generator=torch.Generator().manual_seed(1)) * 0.03):
        assert gain_db(x, twin_log_clean(x, bits), twin_log_released(x, bits)) >= 1


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize(
    "x", [torch.zeros(3, 8), torch.full((2, 8), -3.0), torch.full((1, 8), 65504.0), torch.full((1, 1), 1e-30)]
)
def test_invariant_25_constant_zero_and_huge_rows_stay_finite(x: torch.Tensor, bits: int) -> None:
    rounded = fit_twin_log(x, bits).fake_quantize(x)
    assert torch.allclose(rounded, x, rtol=1e-3, atol=1e-12)
    for other in (twin_log_clean(x, bits), twin_log_released(x, bits)):
        assert torch.isfinite(other).all()
