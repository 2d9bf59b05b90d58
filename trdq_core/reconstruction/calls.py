"""Calls of a module as data: where their tensors stand, and the tensors cut into items, one picture or clip of one branch
each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Values = Mapping[str, Tensor]


class Slot(NamedTuple):
    """Where a tensor stands in a call. With `moved`, parts and tokens have changed places, as a block across frames reads what
    a block within frames left: (items, parts, tokens, channels) as (items * tokens, parts, channels). `offset` is the key of a
    constant (parts, channels) that was added then, the positions of the frames for instance."""

    key: str
    moved: bool = False
    offset: str | None = None


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
    Tensors in `parted` are (items, parts, ...) and go into a call as (items * parts, ...): the frames of a clip, for a block
    that looks at each alone. Texts of different lengths are padded; `lengths` (items,) says how long each is, and only items
    of one length go into one call, since a block that takes no mask would attend to the padding.
    """

    templates: dict[str, CallTemplate]
    values: dict[str, Tensor]  # (items, ...) each
    constants: dict[str, Tensor]
    timesteps: Tensor  # (items,) float64
    prompts: Tensor  # (items,) int64, which prompt
    branches: Tensor  # (items,) int64, position in the guidance batch
    parted: set[str] = field(default_factory=set)
    lengths: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many items there are."""
        return len(self.timesteps)

    def part(self, items: Tensor) -> RecordedCalls:
        """The record of some items alone."""
        values = {key: tensor[items] for key, tensor in self.values.items()}
        columns = (self.timesteps[items], self.prompts[items], self.branches[items])
        lengths = {key: length[items] for key, length in self.lengths.items()}
        return RecordedCalls(self.templates, values, self.constants, *columns, self.parted, lengths)

    def batches(self, items: Tensor, size: int) -> Iterator[Tensor]:
        """`items` in batches of at most `size` that may go into one call; in their order where all are of one length."""
        for alike in self._alike(items):
            yield from alike.split(size)

    def draw(self, items: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """`size` random ones of `items`, with repetition, that may go into one call; every item is as likely as any other."""
        found = self._alike(items)
        if len(found) > 1:
            chances = torch.tensor([len(alike) for alike in found], dtype=torch.float64)
            found = [found[int(torch.multinomial(chances, 1, generator=generator))]]
        return found[0][torch.randint(len(found[0]), (size,), generator=generator)]

    def _alike(self, items: Tensor) -> list[Tensor]:
        if not self.lengths:
            return [items]
        texts = torch.stack([length[items] for length in self.lengths.values()], 1)
        kinds, kind = texts.unique(dim=0, return_inverse=True)
        return [items[kind == index] for index in range(len(kinds))]

    def arguments(
        self, name: str, items: Tensor, values: Values, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the module `name` for some items, floating point as `dtype`. `values` goes before the record."""

        def fill(slot: Slot) -> Tensor:
            constant = self.constants.get(slot.key)
            stored = values.get(slot.key, self.values.get(slot.key)) if constant is None else constant
            assert stored is not None  # what is recorded once stays until the last module that reads it is done
            tensor = (stored[items] if constant is None else constant).to(device)
            if slot.key in self.lengths:
                tensor = tensor[..., : int(self.lengths[slot.key][items[0]]), :]
            tensor = tensor.transpose(1, 2) if slot.moved else tensor
            if slot.key in self.parted:
                tensor = tensor.flatten(0, 1)
            if slot.offset is not None:
                tensor = tensor + self.constants[slot.offset].to(device)
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
