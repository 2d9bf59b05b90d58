"""Groups of timesteps. Time is a value on the model's axis [0, 1000], never a step index, so a 20-step calibration serves a
50-step run with another scheduler."""

from __future__ import annotations

import bisect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from trdq_core.errors import RecipeError
from trdq_core.specs import TIME_SPAN, TimeGroupSpec


class TimeGroups(NamedTuple):
    """Intervals that tile [0, 1000]; `edges` are the rising inner borders, group 0 holds the smallest timesteps."""

    edges: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.edges) + 1

    def group_of(self, timestep: float) -> int:
        """The group a timestep falls into; a timestep on a border belongs to the group above it."""
        return bisect.bisect_right(self.edges, timestep)

    def labels(self) -> list[str]:
        """ "750 to 1000" and so on, one a group."""
        borders = [0.0, *self.edges, TIME_SPAN]
        return [f"{low:g} to {high:g}" for low, high in itertools.pairwise(borders)]


def make_groups(spec: TimeGroupSpec, timesteps: Sequence[float] = ()) -> TimeGroups:
    """The groups of `spec`. Kind "per_step" puts borders halfway between neighbouring `timesteps` and needs them."""
    if spec.kind == "edges":
        return TimeGroups(spec.edges)
    if spec.kind == "uniform":
        return TimeGroups(tuple(TIME_SPAN * i / spec.count for i in range(1, spec.count)))
    rising = sorted(set(timesteps))
    if not rising:
        raise RecipeError("groups: per_step needs the timesteps of a calibration; calibrate first or choose uniform.")
    return TimeGroups(tuple((a + b) / 2 for a, b in itertools.pairwise(rising)))


class TimeContext:
    """Where sampling is on the time axis: one per denoiser, set by one hook, read by its quantized layers."""

    def __init__(self, groups: TimeGroups, calibrated: tuple[float, float] | None = None) -> None:
        self.groups = groups
        self.timestep = 0.0
        self.group = 0
        self._listeners: list[Callable[[int], None]] = []
        self._calibrated = calibrated
        self._warned = False

    def on_change(self, listener: Callable[[int], None]) -> None:
        """Call `listener(group)` whenever sampling enters another group."""
        self._listeners.append(listener)

    def set(self, timestep: float) -> None:
        """Move to `timestep`; leaving the calibrated range by more than a fiftieth of the axis warns once."""
        self.timestep = timestep
        self._check_range(timestep)
        group = self.groups.group_of(timestep)
        if group != self.group:
            self.group = group
            for listener in self._listeners:
                listener(group)

    def attach(self, denoiser: nn.Module, argument: str = "timestep") -> torch.utils.hooks.RemovableHandle:
        """Follow the `argument` of each forward call of `denoiser`. The handle removes the hook."""

        def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.set(timestep_value(kwargs[argument]))

        return denoiser.register_forward_pre_hook(before_forward, with_kwargs=True)

    def _check_range(self, timestep: float) -> None:
        if self._calibrated is None or self._warned:
            return
        low, high = self._calibrated
        slack = TIME_SPAN / 50
        if not low - slack <= timestep <= high + slack:
            self._warned = True
            warnings.warn(
                f"timestep {timestep:g} lies outside the calibrated range {low:g} to {high:g}; "
                "the nearest group is used, calibrate with more steps for exact results.",
                stacklevel=3,
            )


def timestep_value(timestep: torch.Tensor | float) -> float:
    """The timestep of a call as a number; batches share one timestep, so the first counts."""
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
