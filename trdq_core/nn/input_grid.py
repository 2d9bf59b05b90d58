"""The grid of a linear's input: what was fitted for it, as the input quantizer takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.kernels.types import StaticGrid
from trdq_core.numerics.affine import QParams, choose_qparams, fake_quantize, fake_quantize_groups, fake_quantize_tokens
from trdq_core.numerics.ranges import static_range
from trdq_core.numerics.twin_region import SignGrid
from trdq_core.specs import QuantSpec

Range = tuple[float, float]


class InputGrid(NamedTuple):
    """The fitted grid of an input. Without a specification the input stays in floating point (weight-only)."""

    spec: QuantSpec | None
    clips: tuple[float, ...] = (1.0,)  # of dynamic ranges; one, or one for each set
    ranges: tuple[Range, ...] = ()  # of static grids: low and high; one, or one for each set or time group

    @property
    def integer(self) -> bool:
        """Whether the integer kernels take such a grid: uniform, with one scale for each token or for all of them."""
        return self.spec is not None and self.spec.grid == "uniform" and self.spec.granularity != "group"

    def static_grids(self) -> list[StaticGrid]:
        """Scale and zero point of every static range, the latter in the unsigned 8-bit domain of the kernels."""
        if self.spec is None or self.spec.grid != "uniform":
            return []
        return [static_grid(low, high, bits=self.spec.bits, symmetric=self.spec.symmetric) for low, high in self.ranges]

    def round(self, x: Tensor, index: int = 0) -> Tensor:
        """x (tokens, channels), already transformed, rounded to the grid of set or group `index`, in floating point."""
        if self.spec is None:
            return x
        bits, symmetric = self.spec.bits, self.spec.symmetric
        if self.spec.dynamic:
            clip = self.clips[index if len(self.clips) > 1 else 0]
            if self.spec.group_size is not None:
                size = self.spec.group_size
                return fake_quantize_groups(x, bits=bits, symmetric=symmetric, group_size=size, clip=clip)
            return fake_quantize_tokens(x, bits=bits, symmetric=symmetric, clip=clip)
        low, high = self.ranges[index if len(self.ranges) > 1 else 0]
        if self.spec.grid == "twin_region":
            half = 2 ** (bits - 1)
            return SignGrid(-low / half, high / (half - 1), bits).fake_quantize(x)
        return fake_quantize(x, static_qparams(low, high, bits=bits, symmetric=symmetric), bits=bits)


def range_of(rows: Tensor, spec: QuantSpec) -> Range:
    """Low and high of a static grid, searched on sampled rows (rows, channels) as `spec` says; of two regions each its own end.

    Range "output" begins here like "mse"; what weighs it by the output is `second_order`.
    """
    if spec.grid == "twin_region":
        half, grid = 2 ** (spec.bits - 1), SignGrid.fit(rows, spec.bits)
        return -grid.negative_step * half, grid.positive_step * (half - 1)
    return static_range(
        rows,
        bits=spec.bits,
        symmetric=spec.symmetric,
        range="mse" if spec.range == "output" else spec.range,
        clip=spec.clip,
        percentile=spec.percentile,
        momentum=spec.momentum,
    )


def static_qparams(low: float, high: float, *, bits: int, symmetric: bool) -> QParams:
    """The grid of all tokens that spans low..high."""
    return choose_qparams(torch.tensor([low]), torch.tensor([high]), bits=bits, symmetric=symmetric)


def static_grid(low: float, high: float, *, bits: int, symmetric: bool) -> StaticGrid:
    """One grid for all tokens that spans low..high; its zero point is in the unsigned 8-bit domain of the kernels."""
    scale, zero_point = static_qparams(low, high, bits=bits, symmetric=symmetric)
    return StaticGrid(scale, torch.full_like(scale, 128.0) if zero_point is None else zero_point)


def stacked(grids: Sequence[StaticGrid]) -> tuple[Tensor | None, Tensor | None]:
    """Scales and zero points (grids, 1) of several static grids, None of none."""
    if not grids:
        return None, None
    return torch.stack([grid.scale for grid in grids]), torch.stack([grid.zero_point for grid in grids])
