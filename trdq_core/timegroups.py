"""Groups of timesteps. Time is a value on the model's axis [0, 1000], never a step index, so a 20-step calibration serves a
50-step run with another scheduler."""

from __future__ import annotations

import bisect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.specs import TIME_SPAN, TimeGroupSpec

SMALLEST_ABSMAX = 1e-5  # a channel that never moves has no logarithm


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


def make_groups(
    spec: TimeGroupSpec, timesteps: Sequence[float] = (), absmax: Sequence[torch.Tensor] = ()
) -> TimeGroups:
    """The groups of `spec`. Kinds "per_step" and "dp" put borders halfway between neighbouring `timesteps` and need them.

    "dp" cuts where the ranges of the layers change: `absmax` holds one (timesteps, channels) tensor a layer, its rows in the
    order of `timesteps`. RecipeError if what a kind needs is missing.
    """
    if spec.kind == "edges":
        return TimeGroups(spec.edges)
    if spec.kind == "uniform":
        return TimeGroups(tuple(TIME_SPAN * i / spec.count for i in range(1, spec.count)))
    if not len(timesteps) or (spec.kind == "dp" and not len(absmax)):
        raise RecipeError(
            f"groups: {spec.kind} needs the timesteps of a calibration; calibrate first or choose uniform."
        )
    rising = sorted(set(timesteps))
    if spec.kind == "per_step":
        cuts = range(1, len(rising))
    else:
        order = torch.tensor([list(timesteps).index(t) for t in rising])
        cuts = segment_cuts([layer[order] for layer in absmax], spec.count)
    return TimeGroups(tuple((rising[cut - 1] + rising[cut]) / 2 for cut in cuts))


def segment_cuts(absmax: Sequence[torch.Tensor], count: int) -> list[int]:
    """Where to cut T rows into `count` runs of least variance: the rising first indices of all runs but the first.

    `absmax` holds channel ranges (T, channels), one tensor a layer. The sum over layers, each counting as much as another,
    of the squared deviations of log absmax from its mean within the run is the least possible: dynamic programming over all
    cuts, O(T^2 count). Where T < count every row is a run.
    """
    steps = absmax[0].shape[0]
    count = min(count, steps)
    # The deviations within a run are half the mean of all squared distances within it, so one (T, T) table holds them all.
    distance = torch.zeros(steps, steps, dtype=torch.float64)
    for layer in absmax:
        logs = layer.double().clamp_min(SMALLEST_ABSMAX).log()
        distance += torch.cdist(logs, logs, compute_mode="donot_use_mm_for_euclid_dist").square() / logs.shape[1]
    sums = torch.nn.functional.pad(distance.cumsum(0).cumsum(1), (1, 0, 1, 0)).tolist()

    def cost(first: int, end: int) -> float:
        inside = sums[end][end] - sums[first][end] - sums[end][first] + sums[first][first]
        return inside / (2 * (end - first))

    best = [cost(0, end) if end else 0.0 for end in range(steps + 1)]
    choices: list[list[int]] = []
    for runs in range(2, count + 1):
        chosen = [
            min(range(runs - 1, end), key=lambda cut, end=end: best[cut] + cost(cut, end)) if end >= runs else 0
            for end in range(steps + 1)
        ]
        best = [best[cut] + cost(cut, end) if end >= runs else 0.0 for end, cut in enumerate(chosen)]
        choices.append(chosen)
    cuts, end = [], steps
    for chosen in reversed(choices):
        end = chosen[end]
        cuts.append(end)
    return cuts[::-1]


class TimeArgument(NamedTuple):
    """Where a denoiser is told the time, and how that value maps onto the axis [0, 1000] on which large means noise.

    `name` and `position` say which argument of its forward it is; calls give it either way. Flow-matching denoisers count
    from 0 to 1 (`scale` 1000), and some from noise at 0 upwards (`flipped`): 1000 minus the scaled value is the time.
    """

    name: str = "timestep"
    position: int | None = None
    scale: float = 1.0
    flipped: bool = False

    def value(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """The time of a call on the axis. CalibrationError if the call does not say it."""
        if self.name in kwargs:
            told = kwargs[self.name]
        elif self.position is not None and self.position < len(args):
            told = args[self.position]
        else:
            raise CalibrationError(
                f"time: a call of the denoiser has no argument {self.name!r}; the quantized layers cannot tell their group."
            )
        scaled = timestep_value(told) * self.scale
        return TIME_SPAN - scaled if self.flipped else scaled

    def moved(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], timestep: float
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call at another `timestep` of the axis."""
        value = (TIME_SPAN - timestep if self.flipped else timestep) / self.scale
        told = kwargs[self.name] if self.name in kwargs else args[self.position or 0]
        there = torch.full_like(told, value) if isinstance(told, torch.Tensor) else type(told)(value)
        if self.name in kwargs:
            return tuple(args), {**kwargs, self.name: there}
        return tuple(there if index == self.position else one for index, one in enumerate(args)), dict(kwargs)


def time_argument(argument: TimeArgument | str | Sequence[Any]) -> TimeArgument:
    """The argument as it is, as JSON keeps it, or the one of that name whose values are on the axis already."""
    return TimeArgument(argument) if isinstance(argument, str) else TimeArgument(*argument)


class TimeContext:
    """Where sampling is on the time axis: one per denoiser, set by one hook, read by its quantized layers."""

    def __init__(self, groups: TimeGroups, calibrated: tuple[float, float] | None = None) -> None:
        self.groups = groups
        self.timestep = 0.0
        self.group = 0
        self.followed = False  # whether something reads `timestep` itself, with time groups of its own
        self._follows = True
        self._listeners: list[Callable[[int], None]] = []
        self.calibrated = calibrated
        self._warned = False

    def on_change(self, listener: Callable[[int], None]) -> None:
        """Call `listener(group)` whenever sampling enters another group."""
        self._listeners.append(listener)

    @contextmanager
    def held(self, timestep: float) -> Iterator[None]:
        """Stay at `timestep`, whatever the denoiser is called with: one time group, one graph of torch.compile."""
        before = self._follows
        self.set(timestep)
        self._follows = False
        try:
            yield
        finally:
            self._follows = before

    @property
    def constant(self) -> bool:
        """Whether nothing depends on the timestep: one group, and nobody who asks for more than its number."""
        return self.groups.count == 1 and not self._listeners and not self.followed

    def set(self, timestep: float) -> None:
        """Move to `timestep`; leaving the calibrated range by more than a fiftieth of the axis warns once."""
        self.timestep = timestep
        self._check_range(timestep)
        group = self.groups.group_of(timestep)
        if group != self.group:
            self.group = group
            for listener in self._listeners:
                listener(group)

    def attach(
        self, denoiser: nn.Module, argument: TimeArgument | str = "timestep"
    ) -> torch.utils.hooks.RemovableHandle:
        """Follow the `argument` of each forward call of `denoiser`. The handle removes the hook."""
        told = time_argument(argument)

        def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            # Reading a tensor's value ends a graph of torch.compile, so it is left out where nothing depends on it.
            if self._follows and not (torch.compiler.is_compiling() and self.constant):
                self._follow(told, args, kwargs)

        return denoiser.register_forward_pre_hook(before_forward, with_kwargs=True)

    @torch.compiler.disable
    def _follow(self, told: TimeArgument, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.set(told.value(args, kwargs))

    def _check_range(self, timestep: float) -> None:
        if self.calibrated is None or self._warned:
            return
        low, high = self.calibrated
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
