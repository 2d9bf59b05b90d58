"""Invariants 11-19, 23, 25 of the uniform grid."""

from __future__ import annotations

import pytest
import torch

from trdq_core.numerics.affine import choose_qparams, fake_quantize, fake_quantize_tokens, quantize

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
