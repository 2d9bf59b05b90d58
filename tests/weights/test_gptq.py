"""Invariant 28: GPTQ's output error is at most that of rounding to nearest."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from trdq_core.errors import CalibrationError, ShapeError
from trdq_core.specs import QuantSpec
from trdq_core.weights.gptq import DAMPING, _prepare, gptq, second_moments
from trdq_core.weights.grids import fit_grid
from trdq_core.weights.rounding import dequantize_weight, quantize_weight

SPECS = [
    QuantSpec(bits=3, symmetric=False, range="mse"),
    QuantSpec(bits=4, granularity="tensor"),
    QuantSpec(bits=4, granularity="group", group_size=32),
    QuantSpec(bits=4, granularity="group", group_size=32, symmetric=False),
    QuantSpec(bits=3, grid="twin_log", range="mse"),
]


def case(rows: int = 400, width: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (24, width) and correlated inputs (rows, width)."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(rows, width, generator=generator) @ (mixing + 0.3 * torch.eye(width))
    return torch.randn(24, width, generator=generator) * 0.05, inputs


def output_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs.double() @ (rounded - weight.double()).T).square().sum())


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("spec", SPECS)
def test_invariant_28_the_output_error_is_at_most_that_of_nearest(spec: QuantSpec, order: str) -> None:
    weight, inputs = case()
    grid = fit_grid(weight, spec)
    nearest = output_error(weight, grid.nearest(weight), inputs)
    learned = gptq(weight, grid, inputs, order=order)  # type: ignore[arg-type]
    assert output_error(weight, learned, inputs) < 0.8 * nearest
    assert torch.allclose(dequantize_weight(grid.encode(learned)), learned, rtol=1e-12, atol=0)


def test_quantize_weight_reaches_gptq() -> None:
    weight, inputs = case()
    errors = [
        output_error(weight, dequantize_weight(quantize_weight(weight, SPECS[0], rounding=r, inputs=inputs)), inputs)
        for r in ("gptq", "nearest")
    ]
    assert errors[0] < errors[1]


def test_blocks_change_only_the_order_of_sums() -> None:
    weight, inputs = case()
    grid = fit_grid(weight, SPECS[0])
    whole, small = (gptq(weight, grid, inputs, block=b) for b in (1000, 7))
    assert float((whole != small).double().mean()) < 0.01


def test_dead_columns_round_to_nearest_and_few_rows_are_enough() -> None:
    weight, inputs = case(rows=20)
    inputs[:, 5] = 0
    grid = fit_grid(weight, SPECS[0])
    values = gptq(weight, grid, inputs)
    assert torch.equal(values[:, 5], grid.nearest(weight)[:, 5])
    assert output_error(weight, values, inputs) <= output_error(weight, grid.nearest(weight), inputs)
    assert torch.isfinite(gptq(weight, grid, torch.zeros(3, 160))).all()


def test_independent_inputs_leave_nothing_to_correct() -> None:
    weight, _ = case()
    grid = fit_grid(weight, SPECS[0])
    assert torch.equal(gptq(weight, grid, torch.eye(160)), grid.nearest(weight))


@pytest.mark.parametrize("width", [1, 40, 257, 700])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_the_factor_is_that_of_the_inverse_hessian(width: int, order: Literal["natural", "activation"]) -> None:
    """Upper, with a positive diagonal, and U^T U the inverse, also where its triangle is inverted by halves."""
    moments = second_moments(case(2 * width, width)[1])
    factor, columns = _prepare(moments, order, DAMPING)
    damped = moments[columns][:, columns] + DAMPING * moments.diagonal().mean() * torch.eye(width)
    assert torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(width, dtype=torch.float64), atol=1e-9)


def test_missing_or_wrong_inputs_are_one_sentence() -> None:
    weight, inputs = case()
    with pytest.raises(CalibrationError, match=r'blocks\.1\.fc1: rounding "gptq" needs sampled inputs'):
        quantize_weight(weight, SPECS[0], rounding="gptq", layer="blocks.1.fc1")
    with pytest.raises(ShapeError, match=r"needs \(rows, 160\)"):
        quantize_weight(weight, SPECS[0], rounding="gptq", inputs=inputs[:, :5])
    with pytest.raises(CalibrationError, match="NaN"):
        quantize_weight(weight, SPECS[0], rounding="gptq", inputs=inputs * float("nan"))
