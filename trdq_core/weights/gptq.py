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
TRIANGLE = 256  # below this, triangles are inverted as a whole
DAMPING = 0.01  # of the mean diagonal of the Hessian

Order = Literal["natural", "activation"]


def gptq(
    weight: Tensor,
    grid: WeightGrid,
    inputs: Tensor | None = None,
    *,
    moments: Tensor | None = None,
    order: Order = "activation",
    block: int = BLOCK,
    damping: float = DAMPING,
    layer: str = "weight",
) -> Tensor:
    """Grid values (out, in) float64 that keep the output on `inputs` (rows, in), sampled rows of what the linear reads.

    "activation" takes the columns with the largest inputs first. Columns whose input was always zero are rounded to nearest.
    Who rounds several times gives the `second_moments` of the inputs in their place.
    CalibrationError without inputs or with NaN in them, ShapeError if their width is another.
    """
    weight = weight.detach().double()
    moments = second_moments(_checked(weight, inputs, layer)) if moments is None else moments
    factor, columns = _prepare(moments, order, damping)
    # Channels lie in rows meanwhile, so that every step reads and writes memory in one piece.
    left, numbers = weight.T[columns].contiguous(), columns.tolist()
    values = torch.empty_like(left)
    for first in range(0, len(numbers), block):
        last = min(first + block, len(numbers))
        errors = torch.empty_like(left[first:last])
        for position in range(first, last):
            rounded = grid.nearest(left[position, :, None], numbers[position])[:, 0]
            values[numbers[position]] = rounded
            error = (left[position] - rounded).div_(factor[position, position])
            left[position:last].addr_(factor[position, position:last], error, alpha=-1)
            errors[position - first] = error
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return values.T.contiguous()


def second_moments(rows: Tensor) -> Tensor:
    """rows^T rows (in, in) float64 of `rows` (n, in): all that GPTQ and the errors of outputs look at."""
    rows = rows.detach().double()
    return rows.T @ rows


def output_error(change: Tensor, moments: Tensor) -> float:
    """The squared error of the outputs on rows with `moments` (in, in) when weights (out, in) move by `change`."""
    return max(float(((change @ moments) * change).sum()), 0.0)  # rounding can bring it below zero


def _checked(weight: Tensor, inputs: Tensor | None, layer: str) -> Tensor:
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
    return inputs


def _prepare(hessian: Tensor, order: Order, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse Hessian in the order of the columns, and that order."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    # A dead column takes part in no product: any positive curvature makes it round to nearest and correct nobody.
    live_mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    columns = (
        diagonal.argsort(descending=True, stable=True)
        if order == "activation"
        else torch.arange(len(diagonal), device=hessian.device)
    )
    hessian = hessian[columns][:, columns]
    hessian.diagonal().add_(damping * live_mean + dead[columns] * live_mean)
    # With both orders reversed H = L L^T, so H = U^-1 U^-T for the upper U = reversed L^-1, and H^-1 = U^T U: no inverse of H.
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    return _inverse_of_lower(lower).flip(0, 1), columns


def _inverse_of_lower(matrix: Tensor) -> Tensor:
    """The inverse (n, n) of a lower triangular matrix, by halves: products of blocks do most of the work."""
    size = len(matrix)
    if size <= TRIANGLE:
        return torch.linalg.solve_triangular(matrix, torch.eye(size).to(matrix), upper=False)
    half = size // 2
    first, last = _inverse_of_lower(matrix[:half, :half]), _inverse_of_lower(matrix[half:, half:])
    whole = torch.zeros_like(matrix)
    whole[:half, :half], whole[half:, half:] = first, last
    whole[half:, :half] = -(last @ matrix[half:, :half] @ first)
    return whole
