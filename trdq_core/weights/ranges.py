"""Ranges of weights, group by group: min-max, percentile, least squared error, least output error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError, ShapeError
from trdq_core.numerics.affine import fake_quantize
from trdq_core.numerics.ranges import ValueRange, minmax_range, percentile_range, searched_range
from trdq_core.specs import QuantSpec

OUTPUT_CANDIDATES = tuple(0.01 + i * (1.2 - 0.01) / 100 for i in range(101))  # TQ-DiT, arXiv 2502.04056


class Curvature:
    """How much a change of a weight costs at the output: sum of output_weight * (inputs @ change^T)^2."""

    def __init__(self, inputs: Tensor | None, output_weight: Tensor | None, shape: tuple[int, int], layer: str) -> None:
        """`inputs` (rows, in) and `output_weight` (rows, out) or (out,) for a weight of `shape`; errors name `layer`."""
        if inputs is None or not len(inputs):
            raise CalibrationError(
                f'{layer}: range "output" chooses scales by the output error and needs sampled inputs; '
                'calibrate the model, or use range "mse".'
            )
        out_features, in_features = shape
        if inputs.dim() != 2 or inputs.shape[1] != in_features:
            raise ShapeError(
                f'{layer}: got inputs of shape {tuple(inputs.shape)}; range "output" needs (rows, {in_features}), '
                "the layer's width."
            )
        allowed = ((out_features,), (len(inputs), out_features))
        if output_weight is not None and tuple(output_weight.shape) not in allowed:
            raise ShapeError(
                f"{layer}: got output_weight of shape {tuple(output_weight.shape)}; give {allowed[0]} or {allowed[1]}, "
                "one for each output or for each row and output."
            )
        self.inputs = inputs.detach().float()
        self.output_weight = None if output_weight is None else output_weight.detach().float()
        self._moments: dict[int, Tensor] = {}

    def error(self, difference: Tensor, group_size: int) -> Tensor:
        """What a change `difference` (out, in) costs: (out, groups) float64, each group as if it changed alone."""
        blocks = difference.float().unflatten(1, (-1, group_size)).transpose(0, 1)  # (groups, out, size)
        weight = self.output_weight
        if (weight is None or weight.dim() == 1) and len(self.inputs) > group_size:
            # Without a weight of its own for each row, the inputs' second moments say the same and are smaller.
            error = ((blocks @ self._moment(group_size)) * blocks).sum(2).T
            return (error if weight is None else error * weight[:, None]).double()
        change = self.inputs.unflatten(1, (-1, group_size)).transpose(0, 1) @ blocks.transpose(1, 2)
        squares = change.square()  # (groups, rows, out)
        return (squares if weight is None else squares * weight).sum(1).T.double()

    def _moment(self, group_size: int) -> Tensor:
        if group_size not in self._moments:
            blocks = self.inputs.unflatten(1, (-1, group_size)).transpose(0, 1)
            self._moments[group_size] = blocks.transpose(1, 2) @ blocks
        return self._moments[group_size]


def plain_range(weight: Tensor, spec: QuantSpec, group_size: int) -> ValueRange:
    """What `spec` begins with before any search, min-max or percentile, times `clip`: (out, groups) for a weight (out, in),
    equal in all rows for granularity "tensor"."""
    rows = _rows(weight, spec, group_size)
    found = minmax_range(rows)
    if spec.range == "percentile":
        found = percentile_range(rows, spec.percentile, symmetric=spec.symmetric)
    return _by_group(found.scaled(spec.clip), weight, group_size)


def find_range(weight: Tensor, spec: QuantSpec, group_size: int, curvature: Curvature | None) -> ValueRange:
    """The range of each row and group of `weight` (out, in) float64 as `spec` asks, searched ones searched: (out, groups)."""
    found = plain_range(weight, spec, group_size)
    if spec.range == "mse":
        rows = _rows(weight, spec, group_size)
        start = ValueRange(*(part[:1] if spec.granularity == "tensor" else part.reshape(-1, 1) for part in found))
        found = searched_range(rows, start, bits=spec.bits, symmetric=spec.symmetric)
        found = _by_group(found, weight, group_size)
    if curvature is None:
        return found

    def rounded(ratio: float) -> Tensor:
        qparams = found.scaled(ratio).grid(bits=spec.bits, symmetric=spec.symmetric)
        blocks = type(qparams)(*(None if part is None else part[:, :, None] for part in qparams))
        return fake_quantize(weight.unflatten(1, (-1, group_size)), blocks, bits=spec.bits).flatten(1)

    # The published initial scale is absmax / (2^(b-1) - 1/2), a little less than the one that spans the whole range.
    half = 2 ** (spec.bits - 1)
    first = (half - 1) / (half - 0.5) if spec.symmetric else 1.0
    ratios = (1.0, *(first * candidate for candidate in OUTPUT_CANDIDATES))
    pooled = spec.granularity == "tensor"
    return found.scaled(output_ratio(weight, rounded, ratios, curvature, group_size, pooled=pooled))


def output_ratio(
    weight: Tensor,
    rounded: Callable[[float], Tensor],
    ratios: Sequence[float],
    curvature: Curvature,
    group_size: int,
    *,
    pooled: bool = False,
) -> Tensor:
    """The ratio with the least output error for each row and group (out, groups); one for all rows where `pooled`.

    `rounded` gives the weight (out, in) as a grid scaled by the ratio would have it.
    """
    best = best_error = None
    for ratio in ratios:
        error = curvature.error(rounded(ratio) - weight, group_size)
        if pooled:
            error = error.sum().expand_as(error)
        if best is None or best_error is None:
            best, best_error = torch.full_like(error, ratio), error
            continue
        best = torch.where(error < best_error, ratio, best)
        best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def _rows(weight: Tensor, spec: QuantSpec, group_size: int) -> Tensor:
    """The weight as rows that have a range each."""
    return weight.reshape(1, -1) if spec.granularity == "tensor" else weight.reshape(-1, group_size)


def _by_group(found: ValueRange, weight: Tensor, group_size: int) -> ValueRange:
    """Ranges of rows as (out, groups); the one range of a whole tensor for every row."""
    shape = (len(weight), weight.shape[1] // group_size)
    return ValueRange(
        *(part.view(shape) if part.numel() == shape[0] * shape[1] else part.expand(shape) for part in found)
    )
