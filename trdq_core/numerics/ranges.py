"""Which low..high a uniform grid spans: min-max, percentile, or the clipping with the least squared error.

Rows are tensors (rows, n) with a grid each: output channels, groups of them, or one row for a whole tensor.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError
from trdq_core.numerics.affine import QParams, choose_qparams, fake_quantize

CLIP_RATIOS = tuple(1 - 0.0125 * i for i in range(41))  # 1.0 included, so a searched range is never worse than min-max

StaticRange = Literal["minmax", "mse", "percentile", "ema"]


class ValueRange(NamedTuple):
    """Where a grid begins and ends; both broadcast against the tensor."""

    low: Tensor
    high: Tensor

    def scaled(self, factor: float | Tensor) -> ValueRange:
        """The range with both ends multiplied."""
        return ValueRange(self.low * factor, self.high * factor)

    def grid(self, *, bits: int, symmetric: bool) -> QParams:
        """The uniform grid over the range; its scale is representable in fp32, which is how scales are stored."""
        scale, zero_point = choose_qparams(self.low, self.high, bits=bits, symmetric=symmetric)
        # Rounding the scale before integers are chosen keeps them consistent with what kernels read.
        return QParams(scale.float().to(scale.dtype), zero_point)


def minmax_range(rows: Tensor) -> ValueRange:
    """The smallest and largest value of each row: (rows, 1) each."""
    return ValueRange(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))


def percentile_range(rows: Tensor, percentile: float, *, symmetric: bool) -> ValueRange:
    """Each row without its largest values, (rows, 1) each: `percentile` of the magnitudes lie inside a symmetric range;
    an asymmetric one leaves out that share at each end."""
    n = rows.shape[1]
    rank = min(
        n, max(1, -(-int(percentile * n * 1000) // 100_000))
    )  # the smallest value with that share at or below it
    if symmetric:
        high = rows.abs().kthvalue(rank, 1, keepdim=True).values
        return ValueRange(-high, high)
    return ValueRange(rows.kthvalue(n + 1 - rank, 1, keepdim=True).values, rows.kthvalue(rank, 1, keepdim=True).values)


def searched_range(rows: Tensor, start: ValueRange, *, bits: int, symmetric: bool) -> ValueRange:
    """`start` times the ratio of CLIP_RATIOS that rounds each row (rows, n) with the least squared error."""
    best_ratio = best_error = None
    for ratio in CLIP_RATIOS:
        qparams = start.scaled(ratio).grid(bits=bits, symmetric=symmetric)
        error = (fake_quantize(rows, qparams, bits=bits) - rows).square().sum(1, keepdim=True)
        if best_error is None:
            best_ratio, best_error = torch.full_like(error, ratio), error
            continue
        best_ratio = torch.where(error < best_error, ratio, best_ratio)
        best_error = torch.minimum(error, best_error)
    assert best_ratio is not None
    return start.scaled(best_ratio)


def averaged_range(item_ranges: Tensor, momentum: float) -> ValueRange:
    """The exponential average of item ranges (items, 2), first item first; scalars (FSC of TFMQ-DM, arXiv 2311.16503)."""
    if item_ranges.dim() != 2 or item_ranges.shape[1] != 2 or not len(item_ranges):
        raise CalibrationError(
            f'range "ema": got item ranges of shape {tuple(item_ranges.shape)}; give (items, 2), low and high of each item.'
        )
    merged = item_ranges[0]
    for item in item_ranges[1:]:
        merged = momentum * merged + (1 - momentum) * item
    return ValueRange(merged[0], merged[1])


def static_range(
    rows: Tensor,
    *,
    bits: int,
    symmetric: bool,
    range: StaticRange = "minmax",
    clip: float = 1.0,
    percentile: float = 99.9,
    momentum: float = 0.95,
    item_ranges: Tensor | None = None,
) -> tuple[float, float]:
    """(low, high) of one static grid for a whole activation, from sampled `rows` (rows, channels).

    "ema" averages `item_ranges` (items, 2), or without them the ranges of the rows one after another. `clip` multiplies the
    range, before the search of "mse". CalibrationError without rows.
    """
    if not rows.numel():
        raise CalibrationError("activation: no rows were observed; calibrate the model again.")
    flat = rows.reshape(1, -1)
    if range == "ema":
        items = (
            torch.stack([rows.amin(-1).flatten(), rows.amax(-1).flatten()], 1) if item_ranges is None else item_ranges
        )
        found = averaged_range(items, momentum)
    else:
        found = percentile_range(flat, percentile, symmetric=symmetric) if range == "percentile" else minmax_range(flat)
    found = found.scaled(clip)
    if range == "mse":
        found = searched_range(flat, found, bits=bits, symmetric=symmetric)
    return float(found.low), float(found.high)
