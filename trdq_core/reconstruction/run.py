"""All units of a model, one after another: temporal ones, blocks or layers, each behind those that are decided already."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.nn.modules import replace_module
from trdq_core.plan import LayerInfo
from trdq_core.reconstruction.calls import RecordedCalls
from trdq_core.reconstruction.capture import record_calls
from trdq_core.reconstruction.learning import Task, learn_rounding, put_soft, working_copy
from trdq_core.reconstruction.replay import Replay
from trdq_core.reconstruction.storage import UnitStore, digest_of, digest_of_linear
from trdq_core.reconstruction.temporal import between, find_temporal, record_temporal
from trdq_core.reconstruction.units import Unit, UnitLinear, find_blocks, plan_units
from trdq_core.sampling import SampledModel
from trdq_core.specs import Recipe, ReconstructionSpec
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeGroups
from trdq_core.weights.grids import Weight

TICKS = 20  # progress events of one unit
HELD_OUT = 5  # one prompt in five judges the result, one picture in five where there are fewer prompts
VERSION = 1  # of the algorithm: stored units of another one are learned again


@dataclass(frozen=True)
class UnitFacts:
    """What became of one unit. Errors are squared output errors over squared outputs, on held-out items, with nearest and with
    learned rounding; `kept` says whether the learned one was better; `moved` is the share of weights it rounds the other way."""

    unit: str
    kind: str
    layers: tuple[str, ...]
    error_nearest: float
    error_learned: float
    kept: bool
    moved: float
    seconds: float


@dataclass
class Reconstruction:
    """Learned weights by layer name, and the facts of every unit for reports."""

    weights: dict[str, Weight] = field(default_factory=dict)
    units: list[UnitFacts] = field(default_factory=list)

    def facts(self) -> list[dict[str, Any]]:
        """The facts of the units as plain JSON values."""
        return [dataclasses.asdict(unit) for unit in self.units]


def reconstruct(
    model: SampledModel,
    linears: Sequence[UnitLinear],
    recipe: Recipe,
    statistics: Statistics,
    *,
    folder: Path | None = None,
    groups: TimeGroups | None = None,
    seed: int = 0,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> Reconstruction:
    """Learn the rounding of `linears` on the outputs of their units.

    The calibration's prompts are sampled again in full precision, and each unit is learned to give the outputs of full precision
    from the inputs that the blocks before it, decided already, leave it. Timestep, text and what else a block reads are those of
    full precision. A unit whose error on held-out pictures does not
    fall keeps rounding to nearest. Finished units are stored in `folder` and taken from there by the next call with the same
    model, recipe, statistics and seed. `groups` are those that static ranges of the linears go by.
    """
    spec = recipe.reconstruction or ReconstructionSpec()
    layers = model.linears()
    by_name = {linear.name: linear for linear in linears}
    learned = [layer.name for layer in layers if layer.name in by_name]
    unknown = set(by_name) - set(learned)
    if unknown:
        raise CalibrationError(f"{min(unknown)}: the model has no linear of this name; fit the recipe on this model.")
    blocks = find_blocks(layers)
    if spec.unit == "block" and not blocks:
        raise CalibrationError(
            'reconstruction: no transformer block with self-attention was found in this model; use unit "layer".'
        )
    temporal = _temporal_units(model, layers, learned, statistics) if spec.temporal_block else ()
    units = plan_units(learned, blocks, temporal, spec.unit)
    reports = {"on_event": on_event, "cancelled": cancelled, "recipe": recipe.name}
    replays = _record(model, units, blocks, statistics, groups or TimeGroups(), reports)
    units = _in_call_order(units, replays)
    progress = Progress("reconstruct", TICKS * len(units), **reports)
    about = [VERSION, model.fingerprint(), spec.to_dict(), statistics.about.get("fingerprint"), seed]
    store, digest, result = UnitStore(folder), digest_of(about), Reconstruction()
    for index, unit in enumerate(units):
        started = time.monotonic()
        task = _make_task(unit, replays[unit.kind == "temporal"], [by_name[name] for name in unit.layers], model)
        digest = digest_of([digest, *unit, *(digest_of_linear(linear) for linear in task.soft.values())])
        found = store.load(index, digest)
        if found is None:
            ticker = _Ticker(progress, unit.module, spec.iterations)
            upwards, facts = _decide(task, unit, spec, seed + index, ticker, started)
            store.save(index, digest, upwards, dataclasses.asdict(facts))
            ticker.finish()
        else:
            upwards, facts = found[0], UnitFacts(**{**found[1], "layers": unit.layers})
            task.harden(upwards)
            _Ticker(progress, unit.module, 0).finish()
        result.units.append(facts)
        for name, linear in task.soft.items():
            result.weights[name] = linear.linear.grid.encode(linear.values(upwards[name]))
    return result


class _Ticker:
    """Turns iterations of a unit into a fixed number of progress events; looks at Cancel at every one."""

    def __init__(self, progress: Progress, unit: str, iterations: int) -> None:
        self._progress, self._unit, self._iterations = progress, unit, max(iterations, 1)
        self._iteration = self._ticks = 0

    def __call__(self) -> None:
        self._iteration += 1
        while self._ticks < (TICKS - 1) * self._iteration // self._iterations:
            self._ticks += 1
            self._progress.advance(self._unit)
        self._progress.check()

    def finish(self) -> None:
        """The unit is stored: report what is left of its events."""
        while self._ticks < TICKS:
            self._ticks += 1
            self._progress.advance(self._unit)


def _temporal_units(
    model: SampledModel, layers: Sequence[LayerInfo], learned: Sequence[str], statistics: Statistics
) -> tuple[Unit, ...]:
    """The temporal units, with the linears that are learned alone."""
    found = find_temporal(model, layers, statistics)
    units = [unit._replace(layers=tuple(name for name in unit.layers if name in learned)) for unit in found]
    return tuple(unit for unit in units if unit.layers)


def _record(
    model: SampledModel,
    units: Sequence[Unit],
    blocks: Sequence[str],
    statistics: Statistics,
    groups: TimeGroups,
    reports: Mapping[str, Any],
) -> dict[bool, Replay]:
    """What the units are learned on: by True for the temporal ones, by False for all others."""
    replays: dict[bool, Replay] = {}

    def replay(record: RecordedCalls, walked: Sequence[str]) -> Replay:
        numbers = torch.tensor([groups.group_of(timestep) for timestep in record.timesteps.tolist()])
        return Replay(model.denoiser, record, walked, model.device, numbers if groups.count > 1 else None)

    temporal = [unit.module for unit in units if unit.kind == "temporal"]
    if temporal:
        times = [
            *statistics.timesteps,
            *(t for share in (0.25, 0.5, 0.75) for t in between(statistics.timesteps, share)),
        ]
        replays[True] = replay(record_temporal(model, temporal, statistics, times), ())
    others = [unit for unit in units if unit.kind != "temporal"]
    if others:
        last = max((blocks.index(block) for unit in others if (block := _block_of(unit)) is not None), default=-1)
        # Where blocks stand in several lists, which the model takes turns in, the last one needed is not known by its place.
        lists = {block.rpartition(".")[0] for block in blocks}
        walked = blocks[: last + 1] if len(lists) == 1 else blocks
        alone = [unit.module for unit in others if _block_of(unit) is None]
        record = record_calls(model, walked, alone, statistics, lambda total: Progress("observe", total, **reports))
        replays[False] = replay(record, [name for name in record.templates if name in walked])
    return replays


def _in_call_order(units: Sequence[Unit], replays: Mapping[bool, Replay]) -> list[Unit]:
    """The units with those of blocks in the order in which the model calls the blocks; models may list them otherwise."""
    calls = list(replays[False].record.templates) if False in replays else []
    places = [place for place, unit in enumerate(units) if _block_of(unit) is not None]
    ordered = list(units)
    moved = sorted((units[place] for place in places), key=lambda unit: calls.index(_block_of(unit)))
    for place, unit in zip(places, moved, strict=True):
        ordered[place] = unit
    return ordered


def _block_of(unit: Unit) -> str | None:
    return unit.module if unit.kind == "block" else unit.block


def _make_task(unit: Unit, replay: Replay, linears: Sequence[UnitLinear], model: SampledModel) -> Task:
    """The unit with soft linears in place, its inputs behind the decided units, and its outputs in full precision."""
    record, device = replay.record, model.device
    plain = model.denoiser.get_submodule(unit.module)
    if unit.block is not None:
        block, path = replay.enter(unit.block), unit.module[len(unit.block) + 1 :]
        read, _ = replay.inside(block, unit.block, replay.quantized, block.get_submodule(path))
        exact = model.denoiser.get_submodule(unit.block)
        targets: tuple[Tensor, ...] = replay.inside(exact, unit.block, replay.exact, plain)[1:]
        module, soft = put_soft(unit, working_copy(plain), linears)
        replace_module(block, path, module)

        def arguments(items: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (read[items].to(device),), {}

    else:
        if unit.kind == "block":
            module, targets = replay.enter(unit.module), replay.targets
        else:
            module, targets = working_copy(plain), replay.outputs(plain, unit.module, {})
        module, soft = put_soft(unit, module, linears)

        def arguments(items: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return record.arguments(unit.module, items, replay.quantized, device)

    learn, held_out = _split(record, unit.kind == "temporal")
    return Task(
        unit.module, module, soft, arguments, lambda items: [part[items].to(device) for part in targets], learn, held_out,
        record, replay.groups,
    )  # fmt: skip


def _split(record: RecordedCalls, temporal: bool) -> tuple[Tensor, Tensor]:
    """Items to learn on, and items to judge by: of other prompts where there are enough, of other calls where there are not.

    The temporal block is learned and judged on the calibrated timesteps and three between each two: it reads nothing else, so
    these are all it will meet, or next to it.
    """
    items = torch.arange(record.count)
    if temporal:
        return items, items
    prompts = int(record.prompts.max()) + 1
    number = record.prompts if prompts >= HELD_OUT else items // (int(record.branches.max()) + 1)
    judge = number % HELD_OUT == HELD_OUT - 1
    if not judge.any():
        return items, items
    return items[~judge], items[judge]


def _decide(
    task: Task, unit: Unit, spec: ReconstructionSpec, seed: int, on_iteration: Callable[[], None], started: float
) -> tuple[dict[str, Tensor], UnitFacts]:
    """The rounding of a unit, learned or nearest, whichever errs less on held-out items; its module computes with it."""
    nearest = task.nearest()
    task.harden(nearest)
    wrong, _ = task.error(task.learn)
    before, size = task.error(task.held_out)
    upwards = learn_rounding(
        task, spec, scale=max(wrong / len(task.learn), 1e-30), seed=seed, on_iteration=on_iteration
    )
    task.harden(upwards)
    after, _ = task.error(task.held_out)
    kept = after < before
    if not kept:
        upwards = nearest
        task.harden(nearest)
    differs = [linear.values(upwards[name]) != linear.values(nearest[name]) for name, linear in task.soft.items()]
    moved = float(sum(int(d.sum()) for d in differs)) / sum(d.numel() for d in differs)
    size = max(size, 1e-30)
    seconds = round(time.monotonic() - started, 2)
    return upwards, UnitFacts(unit.module, unit.kind, unit.layers, before / size, after / size, kept, moved, seconds)
