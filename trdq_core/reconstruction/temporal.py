"""The temporal block: what reads only the timestep. Found by looking, learned on the timestep alone, or tabulated exactly.

TFMQ-DM (arXiv 2311.16503) learns the rounding of these layers apart from the blocks, on all their outputs together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trdq_core.errors import CalibrationError
from trdq_core.nn.modules import replace_module
from trdq_core.plan import LayerInfo
from trdq_core.reconstruction.calls import RecordedCalls, Slot, map_leaves, tensors_of
from trdq_core.reconstruction.capture import CallRecorder
from trdq_core.reconstruction.units import TEMPORAL_ROLES, Unit
from trdq_core.sampling import SampledModel, sample
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeArgument, TimeContext, time_argument

_SAME = 1e-5  # rows of an input that differ by less, relative to the largest value, are the same


class _Seen(Exception):
    """Everything wanted of this call of the denoiser has been seen."""


class DenoiserCall(NamedTuple):
    """The arguments of one call of the denoiser."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def at(self, argument: TimeArgument | str, timestep: float) -> DenoiserCall:
        """The same call at another timestep."""
        return DenoiserCall(*time_argument(argument).moved(self.args, self.kwargs, timestep))


class ModulationTable(NamedTuple):
    """Outputs of the modules that read only the timestep, in full precision: rows[module][i] is (timesteps, ...)."""

    timesteps: tuple[float, ...]
    rows: Mapping[str, tuple[Tensor, ...]]
    returned: Mapping[str, Any]  # how each module returns its tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(tensor.nbytes for tensors in self.rows.values() for tensor in tensors)

    def index(self, timestep: float) -> int:
        """The row of a timestep; CalibrationError if the table has none, since a near one would be wrong."""
        nearest = min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))
        if abs(self.timesteps[nearest] - timestep) > 1e-3:
            raise CalibrationError(
                f"modulation table: it has no row for timestep {timestep:g}, the nearest is {self.timesteps[nearest]:g}; "
                "make the table for the timesteps that are sampled."
            )
        return nearest

    def lookup(self, module: str, timestep: float, batch: int) -> Any:
        """What `module` returns at a timestep, for `batch` items."""
        index = self.index(timestep)
        found = [rows[index].expand(batch, *rows.shape[1:]) for rows in self.rows[module]]
        return map_leaves(self.returned[module], Slot, lambda slot: found[int(slot.key)])


class Tabulated(nn.Module):
    """Stands in for a module that reads only the timestep: looks its outputs up instead of computing them."""

    def __init__(self, name: str, table: ModulationTable, time: TimeContext) -> None:
        super().__init__()
        self.name, self.table, self.time = name, table, time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns at the present timestep."""
        return self.table.lookup(self.name, self.time.timestep, len(tensors_of((args, kwargs))[0]))


def find_temporal(model: SampledModel, layers: Iterable[LayerInfo], statistics: Statistics) -> tuple[Unit, ...]:
    """The largest modules whose linears all read only the timestep, with these linears, in model order.

    Two prompts are begun from different noise: what reads the same rows in all their pictures depends on nothing else. Only
    linears in embedders and modulation are looked at.
    """
    candidates = [layer.name for layer in layers if layer.role in TEMPORAL_ROLES]
    inputs: dict[str, list[Tensor]] = {name: [] for name in candidates}
    handles = [
        model.denoiser.get_submodule(name).register_forward_pre_hook(_keep_rows(inputs[name])) for name in candidates
    ]
    try:
        first_calls(model, statistics)
    finally:
        for handle in handles:
            handle.remove()
    only_time = {name for name, seen in inputs.items() if seen and _all_same(torch.cat(seen))}
    units: dict[str, list[str]] = {}
    for name in candidates:
        if name in only_time:
            units.setdefault(_largest_around(model.denoiser, name, only_time), []).append(name)
    return tuple(Unit("temporal", module, tuple(names)) for module, names in units.items())


def first_calls(model: SampledModel, statistics: Statistics) -> list[DenoiserCall]:
    """The first call of the denoiser for two of the calibration's prompts, from different noise."""
    about, calls = statistics.about, []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(DenoiserCall(args, dict(kwargs)))

    def stop(*_: object) -> None:
        raise _Seen

    handle = model.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for index, conditioning in enumerate(model.encode([about["prompts"][0], about["prompts"][-1]])):
            try:
                sample(
                    model,
                    conditioning,
                    about["seed"] + index,
                    steps=about["steps"],
                    guidance=about["guidance"],
                    on_step=stop,
                )
            except _Seen:
                continue
    finally:
        handle.remove()
    return calls


def record_temporal(
    model: SampledModel, modules: Sequence[str], statistics: Statistics, timesteps: Sequence[float]
) -> RecordedCalls:
    """One call of each of `modules` for every timestep."""
    call = first_calls(model, statistics)[0]
    recorder = CallRecorder(model.denoiser, modules, model.timestep_argument)
    with recorder.attached():
        _call_at(model, call, modules, timesteps, lambda name, output: None)
    record = recorder.result()
    return record.part(torch.arange(0, record.count, record.count // len(timesteps)))


def modulation_table(model: SampledModel, statistics: Statistics, timesteps: Sequence[float]) -> ModulationTable:
    """The exact outputs of everything that reads only the timestep, at `timesteps`: no linear in it needs to be computed."""
    modules = [unit.module for unit in find_temporal(model, model.linears(), statistics)]
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in modules}
    returned: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        rows[name].append([tensor[:1].clone() for tensor in tensors_of(output)])
        number = itertools.count()
        returned[name] = map_leaves(output, Tensor, lambda _: Slot(str(next(number))))

    if modules:
        _call_at(model, first_calls(model, statistics)[0], modules, timesteps, keep)
    joined = {name: tuple(torch.cat(column) for column in zip(*seen, strict=True)) for name, seen in rows.items()}
    return ModulationTable(tuple(timesteps), joined, returned)


def tabulate(denoiser: nn.Module, table: ModulationTable, time: TimeContext) -> None:
    """Let `denoiser` look up what `table` holds. `time` has to follow the denoiser's calls."""
    for name in table.rows:
        replace_module(denoiser, name, Tabulated(name, table, time))


def between(timesteps: Sequence[float], share: float) -> list[float]:
    """Timesteps that lie `share` of the way from each timestep to the next smaller one."""
    falling = sorted(set(timesteps), reverse=True)
    return [high + share * (low - high) for high, low in itertools.pairwise(falling)]


@torch.no_grad()
def _call_at(
    model: SampledModel,
    call: DenoiserCall,
    modules: Sequence[str],
    timesteps: Sequence[float],
    keep: Callable[[str, Any], None],
) -> None:
    """Repeat a call of the denoiser at each timestep, only as far as the last of `modules`."""
    waiting: set[str] = set()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(name, output)
            waiting.discard(name)
            if not waiting:
                raise _Seen

        return hook

    handles = [model.denoiser.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    try:
        for timestep in timesteps:
            waiting.update(modules)
            moved = call.at(model.timestep_argument, timestep)
            try:
                model.denoiser(*moved.args, **moved.kwargs)
            except _Seen:
                continue
    finally:
        for handle in handles:
            handle.remove()


def _keep_rows(seen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().flatten(0, -2).float())

    return hook


def _all_same(rows: Tensor) -> bool:
    return bool((rows - rows[:1]).abs().max() <= _SAME * rows.abs().max().clamp_min(1e-30))


def _largest_around(denoiser: nn.Module, name: str, only_time: set[str]) -> str:
    """The largest callable module around the linear `name` in which no linear is outside `only_time`."""
    largest = parent = name
    while "." in parent:
        parent = parent.rpartition(".")[0]
        module = denoiser.get_submodule(parent)
        inner = {f"{parent}.{path}" for path, m in module.named_modules() if isinstance(m, nn.Linear)}
        if not inner <= only_time:
            break
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            largest = parent
    return largest
