"""A linear whose rounding is being learned: AdaRound's relaxation of the weight, and its input as the quantized layer sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trdq_core.nn.input_grid import InputGrid
from trdq_core.reconstruction.units import UnitLinear
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.adaround import Neighbours, find_neighbours, initial_logits, soft_weight


class RoundedInput:
    """T(x) on its grid, once for all linears that read x. Gradients pass the rounding as if it were not there.

    Ranges that differ from time group to time group are chosen for each item by `groups` (items,).
    """

    def __init__(self, transform: InputTransform, grid: InputGrid) -> None:
        self.transform, self.grid = transform, grid
        self.groups: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """T(x) on its grid, (items, ..., channels) fp32, whatever the precision of x."""
        if self._last is None or self._last[0] is not x:
            exact = self.transform.apply(x.float())
            rounded = exact if self.grid.spec is None else exact + (self.round(exact.detach()) - exact).detach()
            self._last = (x, rounded)
        return self._last[1]

    def forget(self) -> None:
        """Let go of the last input, whose autograd graph is spent."""
        self._last = None

    def round(self, x: Tensor) -> Tensor:
        """x (items, ..., channels), transformed already, on its grid."""
        rows = x.flatten(0, -2)
        if self.groups is None or len(self.grid.ranges) < 2:
            return self.grid.round(rows).view_as(x)
        group_of_row = self.groups.to(x.device).repeat_interleave(len(rows) // len(self.groups))
        rounded = torch.empty_like(rows)
        for group in self.groups.unique().tolist():
            chosen = group_of_row == group
            rounded[chosen] = self.grid.round(rows[chosen], group)
        return rounded.view_as(x)


class SoftLinear(nn.Module):
    """y = Q_A(T(x)) W_soft^T + x L^T + bias with W_soft = below + h(V) (above - below), the neighbours on the weight's grid.

    V starts where W_soft is the weight itself (AdaRound, arXiv 2004.10568).
    `hard` takes the place of W_soft once the rounding is decided.
    """

    def __init__(self, linear: UnitLinear, bias: Tensor | None, rounded: RoundedInput, device: torch.device) -> None:
        super().__init__()
        self.linear, self.rounded = linear, rounded
        self.neighbours = find_neighbours(linear.weight, linear.grid)
        self.bias = None if bias is None else bias.detach().float()
        self.low_rank = None if linear.low_rank is None else linear.low_rank.float().to(device)
        self.v = nn.Parameter(initial_logits(self.neighbours.fraction).float().to(device))
        self._moved = Neighbours(*(part.float().to(device) for part in self.neighbours))
        self.hard: Tensor | None = None

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """x (..., in) to (..., out), computed in fp32, in x's dtype."""
        weight = self.soft_weight() if self.hard is None else self.hard
        y = functional.linear(self.rounded(x), weight, self.bias)
        if self.low_rank is not None:
            y = y + functional.linear(x.float(), self.low_rank)
        return y.to(x.dtype)

    def soft_weight(self) -> Tensor:
        """W_soft (out, in) fp32."""
        return soft_weight(self._moved, self.v)

    def upwards(self) -> Tensor:
        """Whether the rounding as learned so far takes the neighbour above, (out, in) bool."""
        return (self.v.detach() >= 0).cpu()

    def values(self, upwards: Tensor) -> Tensor:
        """Grid values (out, in) float64 of a rounding."""
        return torch.where(upwards, self.neighbours.above, self.neighbours.below)

    def nearest(self) -> Tensor:
        """Whether the nearest grid value is the neighbour above, (out, in) bool."""
        return self.linear.grid.nearest(self.linear.weight.double()) == self.neighbours.above

    def harden(self, upwards: Tensor | None) -> None:
        """Compute with a decided rounding from now on, or with the relaxed weights again."""
        self.hard = None if upwards is None else self.values(upwards).float().to(self.v.device)


def prepare(module: nn.Module, groups: Tensor | None) -> None:
    """Before a call: the soft linears in `module` let go of the last input and learn the time groups (items,) of the next."""
    for part in module.modules():
        if isinstance(part, SoftLinear):
            part.rounded.forget()
            part.rounded.groups = groups


def make_soft(
    linears: Sequence[UnitLinear], biases: Sequence[Tensor | None], device: torch.device
) -> dict[str, SoftLinear]:
    """The linears of a unit by name; those with one transform object share the rounding of their input."""
    shared: dict[tuple[object, ...], RoundedInput] = {}
    made = {}
    for linear, bias in zip(linears, biases, strict=True):
        moved = InputTransform(*(p.to(device) if isinstance(p, Tensor) else p for p in linear.transform))
        rounded = shared.setdefault((id(linear.transform), linear.input), RoundedInput(moved, linear.input))
        made[linear.name] = SoftLinear(linear, bias, rounded, device)
    return made
