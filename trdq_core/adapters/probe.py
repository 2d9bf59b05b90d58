"""Finding out how an unknown pipeline tells its denoiser the time and runs guidance; and which linears read one tensor.

The first two come from running the pipeline's call for a few steps with a denoiser that answers zeros: nothing is computed.
The last takes one real call of the denoiser, in which the tensors themselves are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trdq_core.adapters.families import TIME_NAMES, GuidanceLayout
from trdq_core.adapters.roles import block_of
from trdq_core.adapters.stock_call import parameters_of
from trdq_core.errors import ModelError
from trdq_core.plan import LayerInfo
from trdq_core.timegroups import TimeArgument

STEPS = 3  # of a probe: the ends of the time axis look alike on several scales
_SCALES = ((1.0, False), (1000.0, False), (1000.0, True), (1.0, True))
_TOLERANCE = 8.0  # on the axis: half-precision timesteps are off by up to 4


class Call(NamedTuple):
    """One call of a denoiser, and the scheduler's timestep of its step."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    timestep: float


def time_of(calls: Sequence[Call], denoiser: nn.Module) -> TimeArgument:
    """Which argument of the denoiser is the time and how it maps onto the axis; ModelError if none follows the scheduler."""
    names = list(parameters_of(type(denoiser).forward))
    by_name = sorted(names, key=lambda name: name not in TIME_NAMES)  # likely names first
    for name in by_name:
        position = names.index(name)
        for scale, flipped in _SCALES:
            argument = TimeArgument(name, position, scale, flipped)
            if all(_follows(argument, call) for call in calls):
                return argument
    raise ModelError(
        f"denoiser {type(denoiser).__name__}: none of its arguments follows the scheduler's timesteps, so its quantized "
        "layers could not tell the time; use one whose forward takes the timestep or sigma."
    )


def _follows(argument: TimeArgument, call: Call) -> bool:
    told = call.kwargs.get(argument.name, call.args[argument.position] if len(call.args) > argument.position else None)
    if (isinstance(told, Tensor) and told.numel() and told.dim() <= 2) or isinstance(told, (int, float)):
        return abs(argument.value(call.args, call.kwargs) - call.timestep) <= _TOLERANCE
    return False


class Branches(NamedTuple):
    """Embeddings of both branches, to tell calls apart by what they are handed."""

    conditional: tuple[Tensor, ...]
    unconditional: tuple[Tensor, ...]
    classes: Tensor | None = None  # class numbers in place of embeddings; what stands beside them is the empty class

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Branches:
        """Pairs `x` and `negative_x` among the tensors of a conditioning; or its classes."""
        if "class_labels" in tensors:
            return cls((), (), tensors["class_labels"])
        pairs = [(tensors[name], tensors[f"negative_{name}"]) for name in tensors if f"negative_{name}" in tensors]
        pairs = [(a, b) for a, b in pairs if a.is_floating_point() and (a.shape != b.shape or not torch.equal(a, b))]
        return cls(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))

    def in_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        """Which branches a call holds, in the order of its batch; empty if it cannot be told."""
        in_lists: list[str] = []  # some pipelines hand over a list with one tensor an item
        for tensor in _tensors((tuple(args), dict(kwargs))):
            if self.classes is not None and tensor.dim() == 1 and len(tensor) == 2 * len(self.classes):
                first, second = tensor.chunk(2)
                if torch.equal(first, self.classes) != torch.equal(second, self.classes):
                    found = ["conditional", "unconditional"]
                    return found if torch.equal(first, self.classes) else found[::-1]
            for one, other in zip(self.conditional, self.unconditional, strict=True):
                held = _halves(tensor, one, other)
                if len(held) == 2:
                    return held
                in_lists += [name for name in held if name not in in_lists]
        return in_lists


def _halves(tensor: Tensor, conditional: Tensor, unconditional: Tensor) -> list[str]:
    """The branches that a tensor over the batch holds. Embeddings may have been padded or cast on their way."""
    for name, one in (("conditional", conditional), ("unconditional", unconditional)):
        other = unconditional if name == "conditional" else conditional
        rest = "unconditional" if name == "conditional" else "conditional"
        if _begins_with(tensor, one) and not _begins_with(tensor, other):
            count = len(one)
            return [name, rest] if len(tensor) >= 2 * count and tensor.dim() == one.dim() else [name]
    return []


def _begins_with(tensor: Tensor, part: Tensor) -> bool:
    if tensor.dim() == part.dim() - 1:
        part = part[0]  # lists hold one tensor an item
    if (
        not tensor.is_floating_point()
        or tensor.dim() != part.dim()
        or tensor.shape[-1] != part.shape[-1]
        or tensor.dim() < 2
    ):
        return False
    if tensor.dim() == 3:
        if tensor.shape[1] < part.shape[1] or len(tensor) < len(part):
            return False
        tensor = tensor[: len(part), : part.shape[1]]
    elif len(tensor) < len(part):
        return False
    else:
        tensor = tensor[: len(part)]
    return torch.equal(tensor.float(), part.to(tensor.dtype).float())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (list, tuple)) else []


def layout_of(calls: Sequence[Call], branches: Branches) -> GuidanceLayout:
    """How guidance runs, from the calls of one guided step."""
    if len(calls) > 1:
        return "two_calls"
    held = branches.in_call(calls[0].args, calls[0].kwargs) if calls else []
    if len(held) < 2:
        return "embedded"
    return "joint" if held[0] == "unconditional" else "joint_reversed"


class _Read(NamedTuple):
    """A tensor that a linear of `block` was handed, its version then, and the number of its group of readers."""

    tensor: Callable[[], Tensor | None]
    version: int
    block: str
    group: int


def traced_inputs(denoiser: nn.Module, run: Callable[[], object], layers: Sequence[LayerInfo]) -> tuple[LayerInfo, ...]:
    """The layers with leaders as one real call shows them: linears of one block that were handed the very same tensor.

    Blocks that all read one tensor, the text for instance, keep transforms of their own: their weights differ too much.
    Linears that the call never reaches get the role "uncalled": nothing would be known of their inputs.
    """
    groups: dict[str, int] = {}
    alive: list[_Read] = []

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            version = -1 if args[0].is_inference() else args[0]._version
            block = block_of(name)
            same = (entry for entry in alive if entry.tensor() is args[0] and entry[1:3] == (version, block))
            known = next(same, None)
            groups.setdefault(name, len(groups) if known is None else known.group)
            if known is None:
                alive[:] = [entry for entry in alive if entry.tensor() is not None]
                alive.append(_Read(weakref.ref(args[0]), version, block, groups[name]))

        return hook

    handles = [denoiser.get_submodule(one.name).register_forward_pre_hook(look(one.name)) for one in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    leaders: dict[int, str] = {}
    found = []
    for layer in layers:
        if layer.name not in groups:
            found.append(layer._replace(role="uncalled", leader=layer.name))
            continue
        found.append(layer._replace(leader=leaders.setdefault(groups[layer.name], layer.name)))
    return tuple(found)
