"""Sign and magnitude on levels whose distance grows exponentially (the twin-log quantizer of LRQ-DiT, arXiv 2508.03485).

Each row has a largest level c and a growth d; with M = 2^(b-1) - 1 the magnitudes are

    m_i = c * (2^(i d) - 1) / (2^(M d) - 1),  i = 0..M

so m_0 = 0, m_M = c, each gap is 2^d times the one before, and d -> 0 is the uniform symmetric grid. This is not the formula
of the paper, whose offset inside the logarithm is an absolute number and therefore depends on how large the weights are;
`trdq_core.numerics.twin_log_offset` has that one. Values are rounded to the nearest level, not to the nearest logarithm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.numerics.affine import TINY
from trdq_core.numerics.ranges import CLIP_RATIOS

SMALLEST_GROWTH = 1e-9  # stands for the uniform grid
GROWTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.05, 1.2)
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
REFINED = (0.25, 0.5, 0.75)  # positions between two neighbouring candidates, on each side of the best


class TwinLog(NamedTuple):
    """One grid a row. Both are float64 (rows, 1) that fp32 can hold."""

    top: Tensor  # c, the largest magnitude
    growth: Tensor  # d, how many octaves a gap is larger than the one before
    bits: int

    def magnitudes(self) -> Tensor:
        """The levels at and above zero, rising: (rows, 2^(bits-1))."""
        last = 2 ** (self.bits - 1) - 1
        steps = torch.arange(last + 1, dtype=self.top.dtype, device=self.top.device)
        octave = self.growth * math.log(2)
        return self.top * torch.expm1(steps * octave) / torch.expm1(last * octave)

    def indices(self, x: Tensor) -> Tensor:
        """The index of the magnitude nearest to each value of x (rows, n)."""
        levels = self.magnitudes()
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        return torch.searchsorted(middles.contiguous(), x.abs().to(levels.dtype).contiguous())

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x (rows, n) on its grid, in x's dtype."""
        return (self.magnitudes().gather(1, self.indices(x)) * x.sign()).to(x.dtype)


def fit_twin_log(x: Tensor, bits: int, *, start: Tensor | None = None, search_top: bool = True) -> TwinLog:
    """The grid of each row of x (rows, n) with the least squared error.

    `start` (rows, 1) is the largest magnitude that is kept, the absmax by default. The search holds the uniform grid at every
    ratio of CLIP_RATIOS, so no row is worse off than on a uniform symmetric grid with a searched range. Without
    `search_top` the largest level stays `start` and only the growth is searched.
    """
    x = x.double()
    start = x.abs().amax(1, keepdim=True) if start is None else start.double()
    start = start.clamp_min(TINY)
    sums = _sorted_sums(x)
    ratios = RATIOS if search_top else (1.0,)
    best = _Best.first(start, bits, sums)
    for ratio in CLIP_RATIOS if search_top else (1.0,):
        best = best.better(start * ratio, torch.full_like(start, SMALLEST_GROWTH), sums)
    for growth in GROWTHS:
        for ratio in ratios:
            best = best.better(start * ratio, torch.full_like(start, growth), sums)
    if bits > 2:  # with two bits there is one gap, and nothing can grow
        best = _refine(best, start, sums, search_top)
    return TwinLog(best.top, best.growth, bits)


class _Sums(NamedTuple):
    """Magnitudes of each row in rising order with their running sums: any grid's error follows from its middles alone."""

    magnitudes: Tensor  # (rows, n)
    first: Tensor  # (rows, n + 1) running sum, zero first
    total: Tensor  # (rows, 1) of squares


def _sorted_sums(x: Tensor) -> _Sums:
    magnitudes = x.abs().sort(1).values
    first = torch.cat([torch.zeros_like(magnitudes[:, :1]), magnitudes.cumsum(1)], 1)
    return _Sums(magnitudes, first, magnitudes.square().sum(1, keepdim=True))


def _error(grid: TwinLog, sums: _Sums) -> Tensor:
    """Squared error of each row (rows, 1) on a grid: sum of x^2 - 2 m x + m^2 over the values nearest to each level m."""
    levels = grid.magnitudes()
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    ends = torch.searchsorted(sums.magnitudes, middles, right=True)
    n = sums.magnitudes.shape[1]
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], n)], 1)
    counts, within = ends.diff(dim=1), sums.first.gather(1, ends).diff(dim=1)
    return sums.total + (levels * (levels * counts - 2 * within)).sum(1, keepdim=True)


class _Best(NamedTuple):
    """The best grid of each row so far."""

    top: Tensor
    growth: Tensor
    error: Tensor
    bits: int

    @classmethod
    def first(cls, start: Tensor, bits: int, sums: _Sums) -> _Best:
        growth = torch.full_like(start, SMALLEST_GROWTH)
        top, growth = start.float().double(), growth.float().double()
        return cls(top, growth, _error(TwinLog(top, growth, bits), sums), bits)

    def better(self, top: Tensor, growth: Tensor, sums: _Sums) -> _Best:
        top, growth = top.float().double(), growth.float().double()
        error = _error(TwinLog(top, growth, self.bits), sums)
        wins = error < self.error
        return _Best(
            torch.where(wins, top, self.top),
            torch.where(wins, growth, self.growth),
            torch.minimum(error, self.error),
            self.bits,
        )


def _refine(best: _Best, start: Tensor, sums: _Sums, search_top: bool) -> _Best:
    """Candidates between each row's best and its neighbours in the coarse search, the two parameters in turn."""
    growths = torch.tensor((SMALLEST_GROWTH, *GROWTHS), dtype=torch.float64, device=best.top.device)
    for _ in range(2):
        middle = best.growth
        index = torch.searchsorted(growths, middle.contiguous()).clamp(0, len(growths) - 1)
        for neighbour in (growths[(index - 1).clamp_min(0)], growths[(index + 1).clamp_max(len(growths) - 1)]):
            for part in REFINED:
                best = best.better(best.top, middle + part * (neighbour - middle), sums)
        if search_top:
            centre = best.top
            for offset in (-0.08, -0.06, -0.04, -0.02, -0.01, 0.01, 0.02, 0.04, 0.06, 0.08):
                best = best.better(torch.minimum(centre + offset * start, start).clamp_min(TINY), best.growth, sums)
    return best
