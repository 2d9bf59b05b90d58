"""Weights to integers or codes: fit the grid, then round to it."""

from __future__ import annotations

from torch import Tensor

from trdq_core.specs import QuantSpec, Rounding
from trdq_core.weights.gptq import gptq
from trdq_core.weights.grids import UniformGrid, fit_grid
from trdq_core.weights.stored import CodedWeight, QuantizedWeight, Weight, dequantize_weight, packed_bytes

__all__ = ["CodedWeight", "QuantizedWeight", "Weight", "dequantize_weight", "packed_bytes", "quantize_weight"]


def quantize_weight(
    weight: Tensor,
    spec: QuantSpec,
    *,
    layer: str = "weight",
    rounding: Rounding = "nearest",
    inputs: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> Weight:
    """`weight` (out, in) on the grid of `spec`; errors name `layer`.

    Rounding "gptq" and range "output" need `inputs` (rows, in), sampled rows of what the linear reads. "adaround" begins at
    nearest: the learning is trdq_core.reconstruction's.
    """
    grid = fit_grid(weight, spec, layer=layer, inputs=inputs, output_weight=output_weight)
    if rounding == "gptq":
        return grid.encode(gptq(weight, grid, inputs, layer=layer))
    if isinstance(grid, UniformGrid):
        return grid.encode(weight)  # which rounds to nearest itself
    return grid.encode(grid.nearest(weight.double()))
