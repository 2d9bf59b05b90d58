"""Invariant 29, first parts: the relaxation starts at the weight and ends on its neighbours."""

from __future__ import annotations

import pytest
import torch

from trdq_core.specs import QuantSpec
from trdq_core.weights.adaround import (
    find_neighbours,
    harden,
    initial_logits,
    rectified_sigmoid,
    rounding_penalty,
    soft_weight,
)
from trdq_core.weights.grids import WeightGrid, fit_grid
from trdq_core.weights.rounding import dequantize_weight

SPECS = [
    QuantSpec(bits=4, symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=32),
    QuantSpec(bits=3, granularity="group", group_size=32, symmetric=False),
    QuantSpec(bits=3, grid="twin_log", range="mse"),
]


def fitted(spec: QuantSpec) -> tuple[torch.Tensor, WeightGrid]:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) * 0.03
    return weight, fit_grid(weight, spec)


@pytest.mark.parametrize("spec", SPECS)
def test_invariant_29_learning_starts_at_the_weight(spec: QuantSpec) -> None:
    weight, grid = fitted(spec)
    neighbours = find_neighbours(weight, grid)
    v = initial_logits(neighbours.fraction).float()
    inside = weight.double().clamp(neighbours.below, neighbours.above)  # clipped ends cannot be reproduced
    assert (soft_weight(neighbours, v) - inside).abs().max() <= 1e-4 * weight.abs().max()
    assert ((inside - weight).abs() > 1e-9).float().mean() < 0.1


@pytest.mark.parametrize("spec", SPECS)
def test_invariant_29_hard_values_are_neighbours_on_the_grid(spec: QuantSpec) -> None:
    weight, grid = fitted(spec)
    neighbours = find_neighbours(weight, grid)
    v = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 3
    values = harden(neighbours, v)
    assert ((values == neighbours.below) | (values == neighbours.above)).all()
    assert torch.allclose(dequantize_weight(grid.encode(values)), values, rtol=1e-12, atol=0)
    start = harden(neighbours, initial_logits(neighbours.fraction))
    nearest = grid.nearest(weight)
    assert torch.allclose((start - weight).abs(), (nearest - weight).abs(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_neighbours_enclose_the_weight_and_nothing_lies_between(spec: QuantSpec) -> None:
    weight, grid = fitted(spec)
    below, above = grid.neighbours(weight)
    nearest = grid.nearest(weight)
    assert ((nearest == below) | (nearest == above)).all()
    inside = below < above
    assert ((below <= weight) & (weight <= above))[inside].all()
    assert inside.float().mean() > 0.8


def test_the_penalty_vanishes_where_everything_is_decided() -> None:
    assert rounding_penalty(torch.tensor([-5.0, 5.0, 9.0]), 2.0) == 0
    assert rounding_penalty(torch.zeros(4), 2.0) == pytest.approx(4.0, abs=1e-6)
    assert rectified_sigmoid(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]


def test_gradients_reach_v() -> None:
    weight, grid = fitted(SPECS[0])
    neighbours = find_neighbours(weight, grid)
    v = initial_logits(neighbours.fraction).float().requires_grad_()
    (soft_weight(neighbours, v).square().sum() + 0.01 * rounding_penalty(v, 20.0)).backward()
    assert v.grad is not None
    assert torch.isfinite(v.grad).all()
    assert v.grad.abs().max() > 0
