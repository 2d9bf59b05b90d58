"""Calls of a module as data: where their tensors stand, and the tensors cut into items, one picture of one branch each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Values = Mapping[str, Tensor]


class Slot(NamedTuple):
    """Where a tensor stands in a call."""

    key: str


class BatchSize(NamedTuple):
    """Where a call is told how many items it has."""


class CallTemplate(NamedTuple):
    """The arguments of a module with slots in place of tensors; keys of what it returns, where others read that."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keys of the tensors it reads."""
        found: list[str] = []
        map_leaves((self.args, self.kwargs), Slot, lambda slot: found.append(slot.key))
        return tuple(found)


@dataclass
class RecordedCalls:
    """Recorded calls of some modules. Item i of every tensor in `values` belongs to one picture, branch and timestep.

    A tensor that several modules read is kept once. `constants` are tensors that no item changes, rotary tables for instance.
    """

    templates: dict[str, CallTemplate]
    values: dict[str, Tensor]  # (items, ...) each
    constants: dict[str, Tensor]
    timesteps: Tensor  # (items,) float64
    prompts: Tensor  # (items,) int64, which prompt
    branches: Tensor  # (items,) int64, position in the guidance batch

    @property
    def count(self) -> int:
        """How many items there are."""
        return len(self.timesteps)

    def part(self, items: Tensor) -> RecordedCalls:
        """The record of some items alone."""
        values = {key: tensor[items] for key, tensor in self.values.items()}
        columns = (self.timesteps[items], self.prompts[items], self.branches[items])
        return RecordedCalls(self.templates, values, self.constants, *columns)

    def arguments(
        self, name: str, items: Tensor, values: Values, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the module `name` for some items, floating point as `dtype`. `values` goes before the record."""

        def fill(slot: Slot) -> Tensor:
            constant = self.constants.get(slot.key)
            stored = values.get(slot.key, self.values.get(slot.key)) if constant is None else constant
            assert stored is not None  # what is recorded once stays until the last module that reads it is done
            tensor = (stored[items] if constant is None else constant).to(device)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        template = self.templates[name]
        args, kwargs = map_leaves((template.args, template.kwargs), Slot, fill)
        return map_leaves((args, kwargs), BatchSize, lambda _: len(items))


def map_leaves(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with every leaf of type `kind` inside tuples, lists and dictionaries changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_leaves(part, kind, change) for key, part in value.items()}
    if isinstance(value, (Slot, BatchSize)):
        return value
    if isinstance(value, (tuple, list)):
        parts = [map_leaves(part, kind, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a module's output, in order."""
    found: list[Tensor] = []
    map_leaves(value, Tensor, found.append)
    return found
