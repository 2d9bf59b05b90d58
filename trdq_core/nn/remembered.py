"""Results that hold for a whole run: what a denoiser makes of its text is the same at every step.

Samplers hand over one tensor of text at each step. As long as it is that tensor, and nobody wrote to it, its projection and
the keys and values that cross-attention makes of it need not be computed again. What is remembered goes with the text.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BRANCHES = 2  # of guidance: where they are run one after the other, each has its text


class _Entry(NamedTuple):
    storage: weakref.ref[Any]  # of the text; views of it are made anew at each step
    place: tuple[Any, ...]
    parts: tuple[object, ...]
    results: tuple[Tensor, ...]
    versions: tuple[int, ...]


class Remembered:
    """The last results of a function of one CPU tensor, with the weights (and the like) that they were made with."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def find(self, x: Tensor, key: Hashable, *parts: object) -> tuple[Tensor, ...] | None:
        """What was kept for x under `key` with these very parts; None where there is nothing, or it was written to since."""
        if not _lasting(x):
            return None
        storage, place = x.untyped_storage(), _place(x, key)
        for entry in self._entries:
            if entry.storage() is storage and entry.place == place and _same(entry.parts, parts):
                return entry.results if _versions(entry.results) == entry.versions else None
        return None

    def keep(self, x: Tensor, key: Hashable, results: tuple[Tensor, ...], *parts: object) -> None:
        """Remember results for as long as the memory of x lives, and for the last two tensors."""
        if not _lasting(x):
            return
        storage = weakref.ref(x.untyped_storage(), self._forget)
        made = _Entry(storage, _place(x, key), parts, results, _versions(results))
        self._entries = [*self._entries, made][-BRANCHES:]

    def _forget(self, storage: weakref.ref[Any]) -> None:
        self._entries = [entry for entry in self._entries if entry.storage is not storage]

    def __deepcopy__(self, memo: dict[int, object]) -> Remembered:
        return Remembered()

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()

    def __len__(self) -> int:
        return len(self._entries)


def _lasting(x: Tensor) -> bool:
    """Whether what is made of x may be kept: inference tensors have no version, a graph of gradients would be kept too, and
    a CUDA graph that is being recorded would never ask again.
    """
    return x.device.type == "cpu" and not x.is_inference() and not torch.is_grad_enabled()


def _place(x: Tensor, key: Hashable) -> tuple[Any, ...]:
    return x._version, x.shape, x.stride(), x.storage_offset(), x.dtype, key


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(-1 if part.is_inference() else part._version for part in tensors)


def _same(parts: tuple[object, ...], others: tuple[object, ...]) -> bool:
    return len(parts) == len(others) and all(part is other for part, other in zip(parts, others, strict=True))
