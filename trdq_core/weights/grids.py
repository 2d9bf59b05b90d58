"""Grids fitted to a weight: uniform per channel, tensor or group, two-level group scales, twin-log.

Fitting and rounding are apart, so that rounding to nearest, GPTQ, learned rounding and low-rank residuals take any grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trdq_core.errors import ShapeError
from trdq_core.numerics.affine import TINY, QParams, dequantize, quantize
from trdq_core.numerics.twin_log import TwinLog, fit_twin_log
from trdq_core.specs import QuantSpec
from trdq_core.weights.ranges import Curvature, find_range, output_ratio, plain_range
from trdq_core.weights.stored import CodedWeight, QuantizedWeight, Weight

LARGEST_GROUP_SCALE = 16  # 16 * 7 = 112 still fits an int8, so the group scale folds into the integer weight


class WeightGrid(Protocol):
    """One fitted grid for a whole weight (out, in); everything in float64."""

    def nearest(self, weight: Tensor, first: int = 0) -> Tensor:
        """Grid values nearest to `weight` (out, n), which stands for the columns first..first+n: (out, n)."""
        ...

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Grid values at or below `weight`, and at or above it, (out, in) each; beyond the ends both are the end."""
        ...

    def encode(self, values: Tensor) -> Weight:
        """Values (out, in) that lie on the grid, as integers or codes."""
        ...


class UniformGrid(NamedTuple):
    """Equally distant levels: a scale, and where asymmetric a zero point, for each row and group of columns."""

    qparams: QParams  # (out, groups) each
    group_size: int  # columns a group
    bits: int
    grouped: bool  # asked for in groups: float scales, which no integer kernel multiplies

    def nearest(self, weight: Tensor, first: int = 0) -> Tensor:
        """See WeightGrid."""
        qparams = self._columns(first, weight.shape[1])
        return dequantize(quantize(weight.double(), qparams, bits=self.bits), qparams)

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See WeightGrid."""
        qparams = self._columns(0, weight.shape[1])
        position = weight.double() / qparams.scale
        below, above = (
            quantize(p * qparams.scale, qparams, bits=self.bits) for p in (position.floor(), position.ceil())
        )
        return dequantize(below, qparams), dequantize(above, qparams)

    def encode(self, values: Tensor) -> Weight:
        """See WeightGrid; values beside the grid are rounded to nearest."""
        half = 2 ** (self.bits - 1)
        scale, zero_point = self.qparams
        integers = quantize(values.double(), self._columns(0, values.shape[1]), bits=self.bits)
        if self.grouped:
            codes = (integers if zero_point is not None else integers + half).to(torch.uint8)
            parameters = [scale] if zero_point is None else [scale, zero_point]
            return CodedWeight(codes, torch.stack(parameters, -1).float(), "uniform", self.group_size, self.bits)
        if zero_point is not None:
            # Unsigned codes and zero points move down together, so that every stored weight is a signed integer.
            integers, zero_point = integers.sub_(half), (zero_point - half)[:, 0].float()
        return QuantizedWeight(integers.to(torch.int8), scale[:, 0].float(), zero_point, None, 0, self.bits)

    def _columns(self, first: int, count: int) -> QParams:
        return QParams(*(_of_columns(part, first, count, self.group_size) for part in self.qparams))


class TwoLevelGrid(NamedTuple):
    """Symmetric groups whose scale is a small integer times one scale a row (QServe, arXiv 2405.04532): no floating-point
    work inside the dot product."""

    scale: Tensor  # (out, 1)
    group_scale: Tensor  # (out, groups), integers in 1..16
    group_size: int
    bits: int

    def nearest(self, weight: Tensor, first: int = 0) -> Tensor:
        """See WeightGrid."""
        return self._round(weight, first, torch.round)

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See WeightGrid."""
        return self._round(weight, 0, torch.floor), self._round(weight, 0, torch.ceil)

    def encode(self, values: Tensor) -> Weight:
        """See WeightGrid."""
        steps = _of_columns(self.group_scale, 0, values.shape[1], self.group_size)
        integers = (values.double() / (self.scale * steps)).round().to(torch.int8)
        return QuantizedWeight(
            integers, self.scale[:, 0].float(), None, self.group_scale.to(torch.int8), self.group_size, self.bits
        )

    def _round(self, weight: Tensor, first: int, how: Callable[[Tensor], Tensor]) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        steps = _of_columns(self.group_scale, first, weight.shape[1], self.group_size)
        integers = how(weight.double() / (self.scale * steps)).clamp(-top, top)
        return integers * steps * self.scale  # in the order of dequantize_weight, so both agree to the last bit


class TwinLogGrid(NamedTuple):
    """Levels whose distance grows exponentially, one grid a row (LRQ-DiT)."""

    levels: TwinLog

    def nearest(self, weight: Tensor, first: int = 0) -> Tensor:
        """See WeightGrid."""
        return self.levels.fake_quantize(weight.double())

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See WeightGrid."""
        magnitudes = self.levels.magnitudes()
        table = torch.cat([-magnitudes[:, 1:].flip(1), magnitudes], 1).contiguous()
        weight = weight.double().contiguous()
        below = (torch.searchsorted(table, weight, right=True) - 1).clamp_min(0)
        above = torch.searchsorted(table, weight).clamp_max(table.shape[1] - 1)
        return table.gather(1, below), table.gather(1, above)

    def encode(self, values: Tensor) -> Weight:
        """See WeightGrid."""
        bits = self.levels.bits
        index = self.levels.indices(values.double())
        codes = torch.where((values < 0) & (index > 0), index + 2 ** (bits - 1), index).to(torch.uint8)
        parameters = torch.stack([self.levels.top, self.levels.growth], -1).float()
        return CodedWeight(codes, parameters, "twin_log", values.shape[1], bits)


def fit_grid(
    weight: Tensor,
    spec: QuantSpec,
    *,
    layer: str = "weight",
    inputs: Tensor | None = None,
    output_weight: Tensor | None = None,
) -> WeightGrid:
    """The grid of `spec` for `weight` (out, in); ShapeError names `layer` if the group size does not divide its width.

    Range "output" chooses scales by the output error on `inputs` (rows, in), weighted by `output_weight` (rows, out) or
    (out,); CalibrationError without inputs.
    """
    weight = weight.detach().double()
    size = _group_size(weight, spec, layer)
    curvature = None
    if spec.range == "output":
        curvature = Curvature(inputs, output_weight, (weight.shape[0], weight.shape[1]), layer)
    if spec.grid == "twin_log":
        return _twin_log(weight, spec, curvature)
    if spec.two_level:
        return _two_level(weight, spec, size, curvature)
    found = find_range(weight, spec, size, curvature)
    return UniformGrid(
        found.grid(bits=spec.bits, symmetric=spec.symmetric), size, spec.bits, spec.granularity == "group"
    )


def _group_size(weight: Tensor, spec: QuantSpec, layer: str) -> int:
    in_features = weight.shape[1]
    if spec.granularity != "group":
        return in_features
    size = spec.group_size or in_features
    if in_features % size:
        divisors = [d for d in (32, 64, 96, 128, 144, 192, 256) if in_features % d == 0]
        raise ShapeError(
            f"{layer}: group_size={size} does not divide in_features={in_features}; "
            f'use one of {", ".join(map(str, divisors)) or "its divisors"} or granularity="channel".'
        )
    return size


def _twin_log(weight: Tensor, spec: QuantSpec, curvature: Curvature | None) -> TwinLogGrid:
    found = plain_range(weight, spec, weight.shape[1])
    start = torch.maximum(found.low.abs(), found.high.abs())
    levels = fit_twin_log(weight, spec.bits, start=start, search_top=spec.range in ("mse", "output"))
    if curvature is not None:
        top = levels.top

        def scaled(ratio: float) -> Tensor:
            return TwinLog((top * ratio).float().double(), levels.growth, spec.bits).fake_quantize(weight)

        ratio = output_ratio(weight, scaled, (1.0, *(0.5 + 0.025 * i for i in range(41))), curvature, weight.shape[1])
        levels = levels._replace(top=(top * ratio).float().double())
    return TwinLogGrid(levels)


def _two_level(weight: Tensor, spec: QuantSpec, size: int, curvature: Curvature | None) -> TwoLevelGrid:
    """Group scales that reach every group's range. A searched range takes the best integer for each group instead, under the
    same scale a row: on normal, heavy-tailed and column-scaled weights, other scales a row gained less than one percent."""
    found = plain_range(weight, spec, size)
    wanted = torch.maximum(found.low.abs(), found.high.abs()).clamp_min(TINY) / (2 ** (spec.bits - 1) - 1)
    scale = (wanted.amax(1, keepdim=True) / LARGEST_GROUP_SCALE).float().double()
    if spec.range in ("mse", "output"):
        return TwoLevelGrid(scale, _best_integers(weight, scale, size, spec.bits, curvature), size, spec.bits)
    return TwoLevelGrid(scale, (wanted / scale).ceil().clamp(1, LARGEST_GROUP_SCALE), size, spec.bits)


def _best_integers(weight: Tensor, scale: Tensor, size: int, bits: int, curvature: Curvature | None) -> Tensor:
    """The integer (out, groups) of each group with the least squared or output error, under a scale (out, 1) a row."""
    shape = (len(weight), weight.shape[1] // size)
    best = best_error = None
    for integer in range(1, LARGEST_GROUP_SCALE + 1):
        candidate = torch.full(shape, float(integer), dtype=torch.float64, device=weight.device)
        difference = TwoLevelGrid(scale, candidate, size, bits).nearest(weight) - weight
        if curvature is None:
            error = difference.unflatten(1, (-1, size)).square().sum(2)
        else:
            error = curvature.error(difference, size)
        if best is None or best_error is None:
            best, best_error = candidate, error
            continue
        best = torch.where(error < best_error, candidate, best)
        best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def _of_columns(part: Tensor | None, first: int, count: int, size: int) -> Tensor | None:
    """A parameter (out, groups) for the columns first..first+count: (out, count), or (out, 1) where one group holds all."""
    if part is None or part.shape[1] == 1:
        return part
    return part[:, torch.arange(first, first + count, device=part.device) // size]
