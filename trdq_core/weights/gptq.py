"""GPTQ (arXiv 2210.17323): round column after column, and let the columns that are left make up for each error.

The grid is fitted once, to the weight as it was, not to each group as the columns reach it. Only so can columns be taken in
any order, do group scales that share one scale a row stay consistent, and does every kind of grid fit in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError, ShapeError
from trdq_core.weights.grids import WeightGrid

BLOCK = 128  # columns whose corrections to the rest are applied together
DAMPING = 0.01  # of the mean diagonal of the Hessian

Order = Literal["natural", "activation"]


def gptq(
    weight: Tensor,
    grid: WeightGrid,
    inputs: Tensor | None,
    *,
    order: Order = "activation",
    block: int = BLOCK,
    damping: float = DAMPING,
    layer: str = "weight",
) -> Tensor:
    """Grid values (out, in) float64 that keep the output on `inputs` (rows, in), sampled rows of what the linear reads.

    "activation" takes the columns with the largest inputs first. Columns whose input was always zero are rounded to nearest.
    CalibrationError without inputs or with NaN in them, ShapeError if their width is another.
    """
    weight = weight.detach().double().clone()
    factor, columns = _prepare(weight, inputs, order, damping, layer)
    values = torch.empty_like(weight)
    weight, numbers = weight[:, columns], columns.tolist()
    for first in range(0, len(columns), block):
        last = min(first + block, len(columns))
        errors = torch.empty_like(weight[:, first:last])
        for position in range(first, last):
            column = numbers[position]
            rounded = grid.nearest(weight[:, position : position + 1], column)
            values[:, column] = rounded[:, 0]
            error = (weight[:, position] - rounded[:, 0]) / factor[position, position]
            weight[:, position:last] -= error[:, None] * factor[position, position:last]
            errors[:, position - first] = error
        weight[:, last:] -= errors @ factor[first:last, last:]
    return values


def triangular(rows: Tensor) -> Tensor:
    """float64 rows (at most in, in) with the second moments of `rows` (n, in): all that GPTQ and output errors look at."""
    rows = rows.detach().double()
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def _prepare(weight: Tensor, inputs: Tensor | None, order: Order, damping: float, layer: str) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse Hessian in the order of the columns, and that order."""
    if inputs is None or not len(inputs):
        raise CalibrationError(
            f'{layer}: rounding "gptq" needs sampled inputs of the layer; calibrate the model, or use rounding "nearest".'
        )
    if inputs.dim() != 2 or inputs.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"{layer}: got inputs of shape {tuple(inputs.shape)}; GPTQ needs (rows, {weight.shape[1]}), the layer's width."
        )
    if not torch.isfinite(inputs).all():
        raise CalibrationError(f"{layer}: its sampled inputs hold NaN or infinity; calibrate the model again.")
    rows = inputs.detach().double()
    hessian = rows.T @ rows
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    # A dead column takes part in no product: any positive curvature makes it round to nearest and correct nobody.
    live_mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    columns = (
        diagonal.argsort(descending=True, stable=True)
        if order == "activation"
        else torch.arange(len(diagonal), device=rows.device)
    )
    hessian = hessian[columns][:, columns]
    hessian.diagonal().add_(damping * live_mean + dead[columns] * live_mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True), columns
