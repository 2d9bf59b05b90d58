"""Linears that read one tensor, rounded together: they share its second moments, and often the rounding itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trdq_core.specs import QuantSpec
from trdq_core.weights.gptq import DAMPING, gptq
from trdq_core.weights.grids import WeightGrid, fit_grid


@dataclass(frozen=True)
class StackedWeights:
    """Weights (out, in) by layer name, and the grid of each; grids are fitted once for all ways of rounding to them."""

    weights: Mapping[str, Tensor]
    spec: QuantSpec

    @cached_property
    def grids(self) -> dict[str, WeightGrid]:
        """The grid of each linear."""
        return {name: fit_grid(weight, self.spec, layer=name) for name, weight in self.weights.items()}

    def nearest(self) -> dict[str, Tensor]:
        """Grid values (out, in) float64 nearest to each weight."""
        return {name: grid.nearest(self.weights[name].double()) for name, grid in self.grids.items()}

    def gptq(self, moments: Tensor, damping: float = DAMPING) -> dict[str, Tensor]:
        """Grid values (out, in) float64 by GPTQ on inputs with second `moments` (in, in). Output channels do not know of each
        other, so one pass does for all linears, unless each has a single scale."""
        if self._together is None:
            return {
                name: gptq(weight, self.grids[name], moments=moments, damping=damping, layer=name)
                for name, weight in self.weights.items()
            }
        first, stacked = next(iter(self.weights)), torch.cat(list(self.weights.values()))
        values = gptq(stacked, self._together, moments=moments, damping=damping, layer=first)
        parts = values.split([len(weight) for weight in self.weights.values()])
        return dict(zip(self.weights, parts, strict=True))

    @cached_property
    def _together(self) -> WeightGrid | None:
        if self.spec.granularity == "tensor" and len(self.weights) > 1:
            return None
        if len(self.weights) == 1:
            return next(iter(self.grids.values()))
        return fit_grid(torch.cat(list(self.weights.values())), self.spec, layer=next(iter(self.weights)))
