"""Measuring sensitivity: each linear alone in a full-precision denoiser, on its own rows and on recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trdq_core import branches, profiling
from trdq_core.convert import Conversion
from trdq_core.evaluation.references import batch_size
from trdq_core.nn.guided_forward import first_tensor
from trdq_core.nn.modules import module_bytes, replace_module, share_copy
from trdq_core.plan import LayerInfo, group_inputs
from trdq_core.sampling import SampledModel, sample_batch
from trdq_core.sensitivity.table import Cell
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics

TIMESTEPS = 4  # of a whole sampling run, spread evenly, at which the denoiser's output is compared
ROWS = 256  # calibration rows a layer's own error is measured on, over all timesteps, at most


class Recorded(NamedTuple):
    """Calls of the denoiser during full-precision sampling: their arguments, and what came out."""

    calls: list[dict[str, Any]]
    outputs: list[Tensor]
    timesteps: list[float]


class Target(NamedTuple):
    """A linear to be quantized alone; `statistics_name` is under which its input was observed."""

    layer: LayerInfo
    group: str
    statistics_name: str


def targets_of(layers: Sequence[LayerInfo], recipe: Recipe) -> list[Target]:
    """The linears that `recipe` quantizes, in model order, each with the first layer of its input group."""
    found = {
        layer.name: Target(layer, group.layers[0].name, group.statistics_name)
        for group in group_inputs(layers, recipe)
        for layer in group.layers
    }
    return [found[layer.name] for layer in layers if layer.name in found]


@torch.no_grad()
def record(
    model: SampledModel, prompts: Sequence[str], *, steps: int, guidance: float, seed: int, on_step: Callable[[], None]
) -> Recorded:
    """Sample prompts in full precision and keep the denoiser's calls at a few steps, spread evenly over the run."""
    conditionings = model.encode(prompts)
    count = min(TIMESTEPS, steps)
    chosen = [int((i + 0.5) * steps / count) for i in range(count)]
    kept: list[dict[str, Any]] = []
    timesteps: list[float] = []
    size = batch_size(model)
    for first in range(0, len(prompts), size):
        part = conditionings[first : first + size]
        seeds = [seed + first + i for i in range(len(part))]
        seen: list[float] = []

        def look(step: int, timestep: float, latents: Tensor, seen: list[float] = seen) -> None:
            seen.append(timestep)
            on_step()

        calls = profiling.record_inputs(
            model.denoiser,
            lambda c=part, s=seeds, f=look: sample_batch(model, c, s, steps=steps, guidance=guidance, on_step=f),
        )
        in_step = len(calls) // len(seen)  # two where each guidance branch has a call
        kept += [call for step in chosen for call in calls[step * in_step : (step + 1) * in_step]]
        timesteps = [seen[step] for step in chosen]
    with branches.joint() if guidance > 1 else branches.single():
        outputs = [_output(model.denoiser, call) for call in kept]
    return Recorded(kept, outputs, timesteps)


@torch.no_grad()
def measure_layers(
    model: SampledModel,
    conversion: Conversion,
    targets: Sequence[Target],
    statistics: Statistics,
    recorded: Recorded,
    *,
    guided: bool = True,
    advance: Callable[[str], None] = lambda detail: None,
) -> list[Cell]:
    """One cell for each target: its layer of `conversion` put alone into a full-precision copy of the denoiser."""
    copy = share_copy(model.denoiser)
    handle = conversion.time.attach(copy, model.timestep_argument)
    cells = []
    try:
        for target in targets:
            name = target.layer.name
            exact = copy.get_submodule(name)
            alone = conversion.denoiser.get_submodule(name)
            own = _layer_error(exact, alone, conversion, statistics, target.statistics_name)
            replace_module(copy, name, alone)
            with branches.joint() if guided else branches.single():
                whole = _denoiser_error(copy, recorded)
            replace_module(copy, name, exact)
            cells.append(Cell(own, whole, *_bytes(alone, target)))
            advance(name)
    finally:
        handle.remove()
    return cells


def _layer_error(
    exact: nn.Module, alone: nn.Module, conversion: Conversion, statistics: Statistics, name: str
) -> float:
    """Squared error over squared output without bias, on rows that no fit has seen, of all calibrated timesteps."""
    rows = statistics.layer(name).rows[:, 1::2]  # fits take the even rows
    rows = rows[:, : max(1, ROWS // len(rows))].to(exact.weight)
    wrong = total = 0.0
    for timestep, part in zip(statistics.timesteps, rows, strict=True):
        conversion.time.set(timestep)
        expected = exact(part)
        wrong += float((alone(part) - expected).double().square().sum())
        linear = expected if exact.bias is None else expected - exact.bias
        total += float(linear.double().square().sum())
    return wrong / max(total, 1e-30)


def _denoiser_error(denoiser: nn.Module, recorded: Recorded) -> float:
    """Mean over the recorded calls of squared error over squared output."""
    errors = []
    for call, expected in zip(recorded.calls, recorded.outputs, strict=True):
        gap = (_output(denoiser, call).double() - expected.double()).square().sum()
        errors.append(float(gap / expected.double().square().sum().clamp_min(1e-30)))
    return sum(errors) / len(errors)


def _output(denoiser: nn.Module, call: Mapping[str, Any]) -> Tensor:
    prediction: Any = first_tensor(denoiser(**call))
    return torch.stack(prediction) if isinstance(prediction, list) else prediction  # some give one tensor an item


def _bytes(layer: nn.Module, target: Target) -> tuple[int, int]:
    """Bytes in memory and packed, bias left out; the first of an input group carries the transform."""
    bias = layer.bias.nbytes if layer.bias is not None else 0
    stored = module_bytes(layer) - bias
    owns = target.layer.name == target.group
    if hasattr(layer, "file_bytes"):  # the layer knows what a file takes
        return stored, layer.file_bytes + (layer.input_quantizer.file_bytes if owns else 0)
    codes = -(-layer.weight_bits * layer.in_features * layer.out_features // 8)
    return stored, stored - layer.qweight.nbytes + codes * layer.sets
