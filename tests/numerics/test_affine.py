"""Invariants 11-19, 23, 25 of the uniform grid."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import ShapeError
from trdq_core.numerics.affine import (
    choose_qparams,
    fake_quantize,
    fake_quantize_groups,
    fake_quantize_tokens,
    quantize,
)

BITS = (4, 6, 8)


def grid(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, object]:
    qparams = choose_qparams(x.min(), x.max(), bits=bits, symmetric=symmetric)
    return fake_quantize(x, qparams, bits=bits), qparams


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_invariant_11_quantizing_twice_changes_nothing(bits: int, symmetric: bool) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    once, qparams = grid(x, bits, symmetric)
    assert torch.equal(fake_quantize(once, qparams, bits=bits), once)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_invariant_12_a_row_has_at_most_two_to_the_bits_levels(bits: int, symmetric: bool) -> None:
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1))
    assert fake_quantize_tokens(x, bits=bits, symmetric=symmetric).unique().numel() <= 2**bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_invariant_13_the_error_is_at_most_half_a_step_and_zero_is_exact(bits: int, symmetric: bool) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(2)).double()
    x[0] = 0
    rounded, qparams = grid(x, bits, symmetric)
    # Rounding the zero point can move the range by half a step, so an asymmetric end may be off by one whole step.
    limit = qparams.scale * (0.5 if symmetric else 1.0)
    assert (rounded - x).abs().max() <= limit * (1 + 1e-9)
    assert rounded[0] == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_invariant_14_order_is_kept(symmetric: bool) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(3)).sort().values
    assert (grid(x, 4, symmetric)[0].diff() >= 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_invariant_15_scaling_the_input_scales_the_output(symmetric: bool) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).double()
    a = fake_quantize_tokens(4 * x, bits=4, symmetric=symmetric)
    assert torch.allclose(a, 4 * fake_quantize_tokens(x, bits=4, symmetric=symmetric), rtol=1e-12)


def test_invariant_16_a_symmetric_grid_is_odd() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(
        fake_quantize_tokens(-x, bits=4, symmetric=True), -fake_quantize_tokens(x, bits=4, symmetric=True)
    )


def test_invariant_17_more_bits_never_hurt() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(6))
    errors = [float((fake_quantize_tokens(x, bits=b, symmetric=False) - x).square().sum()) for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_invariant_23_tokens_do_not_depend_on_their_batch() -> None:
    x = torch.randn(6, 10, 32, generator=torch.Generator().manual_seed(7))
    together = fake_quantize_tokens(x, bits=4, symmetric=False)
    alone = torch.stack([fake_quantize_tokens(item, bits=4, symmetric=False) for item in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "x", [torch.zeros(3, 8), torch.full((2, 8), -3.0), torch.full((1, 8), 65504.0), torch.full((1, 1), 1e-30)]
)
def test_invariant_25_constant_zero_and_huge_inputs_stay_finite(x: torch.Tensor, symmetric: bool) -> None:
    rounded = fake_quantize_tokens(x, bits=4, symmetric=symmetric)
    assert torch.isfinite(rounded).all()
    assert (rounded - x).abs().max() <= x.abs().max() * 0.51 / 7 + 1e-6


def test_integers_lie_in_the_stated_ranges() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(8)) * 5
    for symmetric, low, high in ((True, -7, 7), (False, 0, 15)):
        qparams = choose_qparams(x.min() / 2, x.max() / 2, bits=4, symmetric=symmetric)
        values = quantize(x, qparams, bits=4)
        assert (values.min(), values.max()) == (low, high)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_are_tokens_of_their_own(symmetric: bool) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(9))
    x[..., :16] *= 20
    rounded = fake_quantize_groups(x, bits=4, symmetric=symmetric, group_size=16)
    assert rounded.shape == x.shape
    alone = fake_quantize_tokens(x[..., 16:32], bits=4, symmetric=symmetric)
    assert torch.equal(rounded[..., 16:32], alone)
    whole = fake_quantize_tokens(x, bits=4, symmetric=symmetric)
    assert (rounded - x).square().sum() < 0.5 * (whole - x).square().sum()


def test_invariant_23_groups_do_not_depend_on_their_batch() -> None:
    x = torch.randn(6, 10, 32, generator=torch.Generator().manual_seed(7))
    together = fake_quantize_groups(x, bits=4, symmetric=False, group_size=8)
    alone = torch.stack([fake_quantize_groups(item, bits=4, symmetric=False, group_size=8) for item in x])
    assert torch.equal(together, alone)


def test_clip_shortens_live_ranges() -> None:
    x = torch.tensor([[-1.0, 0.5, 1.0]])
    rounded = fake_quantize_tokens(x, bits=4, symmetric=True, clip=0.9)
    assert torch.allclose(rounded[0, ::2], torch.tensor([-0.9, 0.9]))
    grouped = fake_quantize_groups(x, bits=4, symmetric=True, group_size=3, clip=0.9)
    assert torch.equal(rounded, grouped)


def test_a_group_size_that_does_not_divide_the_channels_is_one_sentence() -> None:
    with pytest.raises(ShapeError, match="activation: group_size=10 does not divide its 32 channels"):
        fake_quantize_groups(torch.zeros(2, 32), bits=4, symmetric=True, group_size=10)
