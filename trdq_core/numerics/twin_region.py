"""Static grids of two regions with a step each, one bit saying which (TQ-DiT, arXiv 2502.04056, after PTQ4ViT).

Softmax outputs: a fine step up to a threshold and a coarse one above. GELU and SiLU outputs: one step below zero, fixed by the
smallest value the function has, and a searched one above. Each value belongs to one region; adding the quantized parts of
both, as the release does, shifts every value above the threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError
from trdq_core.numerics.affine import TINY

THRESHOLDS = tuple(2.0**-i for i in range(20))
SCALES = tuple(0.01 + i * (1.2 - 0.01) / 100 for i in range(101))
GELU_MINIMUM = -0.16997


class SoftmaxGrid(NamedTuple):
    """Values 0..1 on multiples of threshold / m up to the threshold and multiples of 1 / m above it, m = 2^(bits-1) - 1."""

    threshold: float
    bits: int

    @classmethod
    def fit(cls, x: Tensor, bits: int, *, error_weight: Tensor | None = None) -> SoftmaxGrid:
        """The grid whose threshold, a power of two, has the least squared error on softmax outputs x (any shape).

        `error_weight` broadcasts against x and multiplies the squares. A threshold of 1 is the uniform grid of bits - 1.
        """
        _check(x, "softmax")
        return min((cls(t, bits) for t in THRESHOLDS), key=lambda grid: _error(x, grid.fake_quantize(x), error_weight))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x on the nearest level of its region, in x's dtype."""
        m = 2 ** (self.bits - 1) - 1
        first_above = self._first_above()
        fine = (x * (m / self.threshold)).round().clamp(0, m) * (self.threshold / m)
        if first_above > m:
            return fine
        coarse = (x * m).round().clamp(first_above, m) / m
        # Between the threshold and the first level above it the nearer one counts, so that order is kept.
        return torch.where(x <= (self.threshold + first_above / m) / 2, fine, coarse)

    def levels(self) -> Tensor:
        """All levels, rising, float64: at most 2^bits."""
        m = 2 ** (self.bits - 1) - 1
        coarse = torch.arange(self._first_above(), m + 1, dtype=torch.float64) / m
        return torch.cat([torch.arange(m + 1, dtype=torch.float64) * (self.threshold / m), coarse])

    def _first_above(self) -> int:
        """The number of the first coarse level above the threshold."""
        m = 2 ** (self.bits - 1) - 1
        return int(self.threshold * m) + 1


class SignGrid(NamedTuple):
    """Values below zero on 2^(bits-1) multiples of one step, zero and above on as many multiples of another."""

    negative_step: float
    positive_step: float
    bits: int

    @classmethod
    def fit(cls, x: Tensor, bits: int, *, minimum: float | None = None, error_weight: Tensor | None = None) -> SignGrid:
        """The grid for outputs x (any shape) of an activation function whose smallest value is `minimum`, which is exactly
        representable; None takes the smallest value of x. The positive step is searched for the least squared error.

        `error_weight` broadcasts against x and multiplies the squares.
        """
        _check(x, "activation")
        half = 2 ** (bits - 1)
        lowest = float(x.min()) if minimum is None else minimum
        negative_step = max(-lowest, TINY) / half
        highest = max(float(x.max()), TINY)
        steps = [highest / (half - 1), *(highest / (half - 0.5) * scale for scale in SCALES)]
        above = x > 0  # what lies below zero is rounded alike for all of them
        values = x[above]
        weight = None if error_weight is None else error_weight.expand_as(x)[above]
        grids = (cls(negative_step, step, bits) for step in steps)
        return min(grids, key=lambda grid: _error(values, grid._above_zero(values), weight))

    def _above_zero(self, x: Tensor) -> Tensor:
        step = self.positive_step
        return (x / step).round_().clamp_(0, 2 ** (self.bits - 1) - 1).mul_(step)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x on the nearest level of its sign, in x's dtype."""
        half = 2 ** (self.bits - 1)
        steps = torch.tensor([self.negative_step, self.positive_step], dtype=x.dtype, device=x.device)
        step = torch.where(x < 0, *steps)
        return (x / step).round_().clamp_(-half, half - 1).mul_(step)  # a quotient has the sign of x

    def levels(self) -> Tensor:
        """All levels, rising, float64: 2^bits."""
        half = 2 ** (self.bits - 1)
        numbers = torch.arange(-half, half, dtype=torch.float64)
        return numbers.clamp_max(0) * self.negative_step + numbers.clamp_min(0) * self.positive_step


def _error(x: Tensor, rounded: Tensor, weight: Tensor | None) -> float:
    squares = (rounded - x).square_()
    return float((squares if weight is None else squares * weight).sum(dtype=torch.float64))


def _check(x: Tensor, name: str) -> None:
    if not x.numel():
        raise CalibrationError(f"{name}: no values were observed; calibrate the model again.")
    if not torch.isfinite(x).all():
        raise CalibrationError(f"{name}: its observed values hold NaN or infinity; calibrate the model again.")
