"""Soft linears: the relaxation, its penalty, and inputs as the quantized layer sees them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trdq_core.nn.input_grid import InputGrid
from trdq_core.numerics.affine import fake_quantize_static, fake_quantize_tokens
from trdq_core.reconstruction.soft import RoundedInput, SoftLinear, make_soft
from trdq_core.reconstruction.units import UnitLinear
from trdq_core.specs import QuantSpec
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.grids import fit_grid
from trdq_core.weights.rounding import dequantize_weight

GRIDS = {
    "channel": QuantSpec(bits=4, symmetric=False),
    "group": QuantSpec(bits=4, granularity="group", group_size=16),
    "twin_log": QuantSpec(bits=3, grid="twin_log"),
    "clipped": QuantSpec(bits=2, range="mse"),
}
TOKENS = QuantSpec(bits=4, granularity="token", dynamic=True)
CPU = torch.device("cpu")


def soft_linear(spec: QuantSpec, **options: object) -> SoftLinear:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)).double()
    linear = UnitLinear("layer", InputTransform(), weight, fit_grid(weight, spec), **options)
    return make_soft([linear], [None], CPU)["layer"]


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_invariant_29_soft_rounding_starts_at_the_weight(spec: QuantSpec) -> None:
    soft = soft_linear(spec)
    inside = soft.linear.weight.clamp(
        soft.neighbours.below, soft.neighbours.above
    )  # what lies beyond the grid starts at its end
    assert (soft.soft_weight() - inside).abs().max() < 1e-4


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_invariant_29_final_codes_are_neighbours(spec: QuantSpec) -> None:
    soft = soft_linear(spec)
    with torch.no_grad():
        soft.v.add_(torch.randn(soft.v.shape, generator=torch.Generator().manual_seed(2)))
    upwards = soft.upwards()
    stored = dequantize_weight(soft.linear.grid.encode(soft.values(upwards)))
    assert torch.allclose(stored, torch.where(upwards, soft.neighbours.above, soft.neighbours.below), atol=1e-6)
    assert upwards.any() and not upwards.all()


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_rounding_to_nearest_is_a_choice_of_neighbours(spec: QuantSpec) -> None:
    soft = soft_linear(spec)
    assert torch.equal(soft.values(soft.nearest()), soft.linear.grid.nearest(soft.linear.weight))


def test_gradients_pass_the_rounding_of_the_input() -> None:
    soft = soft_linear(GRIDS["channel"], input=InputGrid(TOKENS))
    x = torch.randn(5, 64, requires_grad=True)
    soft(x).sum().backward()
    assert torch.allclose(x.grad, soft.soft_weight().sum(0).expand(5, -1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_learn_in_full(dtype: torch.dtype) -> None:
    soft = soft_linear(GRIDS["channel"], input=InputGrid(TOKENS), low_rank=torch.ones(24, 64).double())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = soft(x)
    assert y.dtype is dtype and torch.equal(y, soft(x.float()).to(dtype))
    y.float().square().sum().backward()
    assert soft.v.grad is not None and soft.v.grad.dtype is torch.float32 and soft.v.grad.abs().sum() > 0


def test_dynamic_inputs_are_rounded_token_by_token() -> None:
    x = torch.randn(3, 7, 64)
    spec = QuantSpec(bits=4, symmetric=False, granularity="token", dynamic=True)
    rounded = RoundedInput(InputTransform(), InputGrid(spec))(x)
    assert torch.allclose(rounded, fake_quantize_tokens(x, bits=4, symmetric=False), atol=1e-6)


def test_groups_of_a_token_have_ranges_of_their_own() -> None:
    x = torch.randn(3, 64)
    spec = QuantSpec(bits=4, granularity="group", group_size=16, dynamic=True)
    parts = [fake_quantize_tokens(part, bits=4, symmetric=True) for part in x.split(16, 1)]
    assert torch.allclose(RoundedInput(InputTransform(), InputGrid(spec)).round(x), torch.cat(parts, 1), atol=1e-6)


def test_static_ranges_follow_the_time_group_of_each_item() -> None:
    spec = QuantSpec(bits=8, symmetric=False, granularity="tensor")
    rounded = RoundedInput(InputTransform(), InputGrid(spec, ranges=((-1.0, 1.0), (-9.0, 9.0))))
    rounded.groups = torch.tensor([1, 0])
    x = torch.tensor([[[5.0]], [[5.0]]])
    assert torch.allclose(rounded.round(x).flatten(), torch.tensor([5.0, 1.0]), atol=0.05)
    one = RoundedInput(InputTransform(), InputGrid(spec, ranges=((-9.0, 9.0),))).round(x)
    assert torch.allclose(one, fake_quantize_static(x, torch.tensor([-9.0, 9.0]), bits=8, symmetric=False))


def test_readers_of_one_transform_share_the_rounded_input() -> None:
    transform = InputTransform(hadamard_block=16)
    weight = torch.randn(8, 64).double()
    grid = fit_grid(weight, GRIDS["channel"])
    made = make_soft([UnitLinear(name, transform, weight, grid) for name in ("q", "k")], [None, None], CPU)
    x = torch.randn(2, 64)
    made["q"](x)
    assert made["q"].rounded is made["k"].rounded
    assert made["k"].rounded(x) is made["q"].rounded(x)


def test_a_low_rank_branch_reads_the_exact_input() -> None:
    low_rank = torch.randn(24, 64).double()
    soft = soft_linear(GRIDS["channel"], input=InputGrid(TOKENS), low_rank=low_rank)
    plain = soft_linear(GRIDS["channel"], input=InputGrid(TOKENS))
    x = torch.randn(5, 64)
    assert torch.allclose(soft(x) - plain(x), functional.linear(x, low_rank.float()), atol=1e-4)
