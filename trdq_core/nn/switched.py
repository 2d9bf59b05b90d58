"""Switched storage: the sets of all time groups in one memory-mapped file, only the active one in memory.

The exact time-grouped method at the memory of one set; sampling downwards through K groups costs K - 1 swaps. On a CPU a swap
exchanges pointers: the layers' buffers become views of the mapped file, whose pages a thread has read while the group before
was at work. So at most one extra set is in memory, as clean pages that the system may take back; those of the set that was
left are given back at once. On other devices the set is copied into the buffers.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from trdq_core.errors import StorageError
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.mapped_sets import MappedFiles, Range, Reader

Buffers = Mapping[str, Mapping[str, Tensor]]  # module name -> buffer name -> (1, ...) tensor of one set


SetName = Callable[[int, str], str]  # group and "module.buffer" to the name of the stored tensor


def numbered(group: int, name: str) -> str:
    """The names of a file that holds nothing but sets: "0.blocks.1.attn1.to_q.qweight"."""
    return f"{group}.{name}"


class Ready(NamedTuple):
    """A set that only has to be put in place."""

    parts: list[tuple[str, nn.Module, dict[str, Tensor], Any]]  # name, module, its buffers, what it makes of them
    ranges: list[Range]  # of the file


class SwitchedSets:
    """Swaps the buffers of quantized layers when sampling enters another time group.

    The sets stand in one file or in the shards of a checkpoint, memory-mapped; `name` tells what a tensor is called there.
    """

    def __init__(
        self, files: Path | Sequence[Path], modules: Mapping[str, nn.Module], name: SetName = numbered
    ) -> None:
        self.files = (files,) if isinstance(files, Path) else tuple(files)
        self.active = self._ahead = 0
        self.swap_seconds: list[float] = []
        self.modules = dict(modules)
        self._name = name
        # Names, not tensors: moving a model to another device puts new tensors in the place of its buffers.
        self._targets = [f"{prefix}.{key}" for prefix, module in modules.items() for key in set_buffers(module)]
        self._stored = MappedFiles(self.files)
        self._reader = Reader()
        self._ready: dict[int, Ready] = {}
        first = next(iter(self._targets), None)
        self.count = 0 if first is None else _sets_of(first, self._stored.places, name)
        self._prefetch()

    @property
    def nbytes(self) -> int:
        """Size of the files with all sets."""
        return sum(file.stat().st_size for file in self.files)

    def names(self) -> list[str]:
        """The swapped buffers as "module.buffer"."""
        return list(self._targets)

    def tensor(self, group: int, name: str) -> Tensor:
        """One buffer (1, ...) of one set, read from its file."""
        return self._stored.tensor(self._name(group, name))

    def activate(self, group: int) -> None:
        """Put the set of `group` in the place of the layers' buffers, and have the next one read."""
        if group == self.active:
            return
        started = time.perf_counter()
        self._reader.wait()
        for name, module, buffers, prepared in self._look_up(group).parts:
            held = next(module._buffers[key] for key in buffers)
            if held is None or held.is_meta:
                raise StorageError(
                    f"{name}: switched sets need their layers in memory, and this one was offloaded with its buffers; "
                    'use enable_model_cpu_offload, or a recipe with storage "resident".'
                )
            if held.device.type == "cpu":
                module.take(buffers, prepared)
                continue
            for key, buffer in buffers.items():
                module._buffers[key].copy_(buffer)
            module.refresh()
        stale = {self.active, self._ahead} - {group}
        self.active = group
        self._prefetch(stale)
        self.swap_seconds.append(time.perf_counter() - started)

    def _look_up(self, group: int) -> Ready:
        """A set as the layers take it; made once, since views of the file hold no memory of their own."""
        if group not in self._ready:
            buffers: dict[str, dict[str, Tensor]] = {}
            for name in self._targets:
                prefix, _, key = name.rpartition(".")
                buffers.setdefault(prefix, {})[key] = self.tensor(group, name)
                time.sleep(0)  # lets the sampling thread have the interpreter at once
            parts = []
            for prefix, own in buffers.items():
                parts.append((prefix, self.modules[prefix], own, self.modules[prefix].prepare(own)))
                time.sleep(0)
            ranges = self._stored.ranges(self._name(group, name) for name in self._targets)
            self._ready[group] = Ready(parts, ranges)
        return self._ready[group]

    def _prefetch(self, stale: Iterable[int] = ()) -> None:
        """Read the set below the active one, or the topmost for the next run: timesteps fall while a model samples. The pages
        of `stale` sets go.
        """
        if self.count < 2:
            return
        self._ahead = coming = (self.active - 1) % self.count
        leaving = [group for group in stale if group != coming]
        sets, stored = weakref.ref(self), self._stored

        def work() -> None:
            owner = sets()
            if owner is None:
                return
            for group in leaving:
                stored.release(owner._look_up(group).ranges)
            stored.touch(owner._look_up(coming).ranges)

        self._reader.begin(work)


def _sets_of(target: str, places: Mapping[str, object], name: SetName) -> int:
    """How many sets hold a tensor for this target."""
    return next(group for group in itertools.count() if name(group, target) not in places)


def set_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a quantized module that differ from set to set."""
    if not isinstance(module, (QuantizedLinear, InputQuantizer)):
        return {}
    return {name: b for name, b in module.named_buffers(recurse=False) if b is not None and name != "bias"}


def write_sets(file: Path, sets: Sequence[Buffers]) -> None:
    """Write all sets into one safetensors file; StorageError if the disk is full, and then no partial file remains."""
    tensors = {
        f"{index}.{module}.{name}": tensor.contiguous()
        for index, buffers in enumerate(sets)
        for module, parts in buffers.items()
        for name, tensor in parts.items()
    }
    partial = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{file.name}: the switched sets could not be written ({error}); free some disk space."
        ) from error


def keep_first_set(modules: Iterable[nn.Module]) -> None:
    """Leave only the first of their resident sets in the layers' buffers."""
    for module in modules:
        for name, buffer in set_buffers(module).items():
            module._buffers[name] = buffer[:1].clone()
        module.sets = 1
        module.refresh()
