"""Learning the rounding of one unit: what its outputs should be, the loss, and the choice between learned and nearest."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trdq_core.errors import CalibrationError
from trdq_core.nn.modules import replace_module, share_copy
from trdq_core.reconstruction.calls import RecordedCalls, tensors_of
from trdq_core.reconstruction.soft import SoftLinear, make_soft, prepare
from trdq_core.reconstruction.units import Unit, UnitLinear
from trdq_core.specs import ReconstructionSpec
from trdq_core.weights.adaround import rounding_penalty

CHUNK = 16  # items that are computed at a time where nothing is learned


@dataclass
class Task:
    """A unit at work: a copy of its module with soft linears, the calls it is learned on, and the outputs wanted."""

    name: str
    module: nn.Module
    soft: dict[str, SoftLinear]
    arguments: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
    targets: Callable[[Tensor], list[Tensor]]
    learn: Tensor  # items learned on
    held_out: Tensor  # items the result is judged by
    record: RecordedCalls  # which items may go into one call
    groups: Tensor | None = None  # (items,) time group, where static input ranges differ between them

    def outputs(self, items: Tensor) -> list[Tensor]:
        """What the module computes for some items now."""
        prepare(self.module, None if self.groups is None else self.groups[items])
        args, kwargs = self.arguments(items)
        return tensors_of(self.module(*args, **kwargs))

    @torch.no_grad()
    def error(self, items: Tensor) -> tuple[float, float]:
        """Squared error of all outputs for some items, and the squared size of what they should be."""
        wrong = size = 0.0
        for part in self.record.batches(items, CHUNK):
            for got, wanted in zip(self.outputs(part), self.targets(part), strict=True):
                wrong += float((got - wanted.view_as(got)).square().sum())
                size += float(wanted.square().sum())
        return wrong, size

    def harden(self, upwards: Mapping[str, Tensor] | None) -> None:
        """Decide the rounding by which weights go to their upper neighbour, or compute with relaxed weights again."""
        for name, linear in self.soft.items():
            linear.harden(None if upwards is None else upwards[name])

    def nearest(self) -> dict[str, Tensor]:
        """The choice of rounding to nearest, (out, in) bool by layer."""
        return {name: linear.nearest() for name, linear in self.soft.items()}


def working_copy(module: nn.Module) -> nn.Module:
    """A copy to put soft linears into: it computes in fp32, and shares the parameters of a module that does so already."""
    if all(p.dtype == torch.float32 for p in module.parameters() if p.is_floating_point()):
        return share_copy(module)
    return copy.deepcopy(module).float()


def put_soft(unit: Unit, module: nn.Module, linears: Sequence[UnitLinear]) -> tuple[nn.Module, dict[str, SoftLinear]]:
    """Replace the linears of a unit in a copy of its module; the module itself where the unit is a single linear."""
    paths = {linear.name: linear.name[len(unit.module) + 1 :] for linear in linears}
    found = [module.get_submodule(path) if path else module for path in paths.values()]
    for linear, plain in zip(linears, found, strict=True):
        if not isinstance(plain, nn.Linear):
            raise CalibrationError(
                f"{linear.name}: expected a linear layer, found {type(plain).__name__}; load the model afresh."
            )
    device = found[0].weight.device
    soft = make_soft(linears, [plain.bias for plain in found], device)
    for name, path in paths.items():
        if not path:
            return soft[name], soft
        replace_module(module, path, soft[name])
    return module, soft


@torch.enable_grad()
def learn_rounding(
    task: Task, spec: ReconstructionSpec, *, scale: float, seed: int, on_iteration: Callable[[], None]
) -> dict[str, Tensor]:
    """Which weights take their upper neighbour, (out, in) bool by layer.

    loss = squared error of the outputs / `scale` + round_weight * sum(1 - |2 h - 1|^beta), over random items, with beta
    falling from `beta[0]` to `beta[1]` after the warm-up, in which the penalty is left out. With `scale` the error of an item
    under nearest rounding, the size of the outputs does not matter; a round_weight too small leaves weights undecided, and
    what they gained is lost when they are rounded in the end.
    """
    task.harden(None)
    generator = torch.Generator().manual_seed(seed)
    parameters = [linear.v for linear in task.soft.values()]
    optimizer = torch.optim.Adam(parameters, lr=spec.learning_rate, fused=True)
    for iteration, beta in enumerate(betas(spec)):
        items = task.record.draw(task.learn, spec.batch, generator)
        pairs = zip(task.outputs(items), task.targets(items), strict=True)
        loss = sum((got - wanted.view_as(got)).square().sum() for got, wanted in pairs) / (spec.batch * scale)
        if beta is not None:
            loss = loss + spec.round_weight * sum(rounding_penalty(v, beta) for v in parameters)
        if not math.isfinite(loss.item()):
            raise CalibrationError(
                f"{task.name}: the loss of learning its rounding is not finite at iteration {iteration + 1}; "
                "lower learning_rate, or look for NaN in the model's weights."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=parameters)
        optimizer.step()
        on_iteration()
    return {name: linear.upwards() for name, linear in task.soft.items()}


def betas(spec: ReconstructionSpec) -> Iterator[float | None]:
    """The exponent of the penalty at each iteration: None while warming up, then a straight line between its two ends."""
    first = int(spec.warm_up * spec.iterations)
    for iteration in range(spec.iterations):
        if iteration < first:
            yield None
            continue
        share = (iteration - first) / max(1, spec.iterations - first - 1)
        yield spec.beta[0] + (spec.beta[1] - spec.beta[0]) * share
