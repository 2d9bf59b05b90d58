"""Switched storage: the sets of all time groups in one memory-mapped file, only the active one in memory.

The exact time-grouped method at the memory of one set; sampling downwards through K groups costs K - 1 swaps. On a CPU a swap
exchanges pointers: the layers' buffers become views of the mapped file, whose pages a thread has read while the group before
was at work. So at most one extra set is in memory, as clean pages that the system may take back; those of the set that was
left are given back at once. On a GPU the set is copied into the buffers, from page-locked memory and block by block: see
`switched_device`.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from trdq_core.errors import StorageError
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.mapped_sets import MappedFiles, Range, Reader
from trdq_core.nn.switched_device import CudaEngine, DeviceSets, Engine

Buffers = Mapping[str, Mapping[str, Tensor]]  # module name -> buffer name -> (1, ...) tensor of one set


SetName = Callable[[int, str], str]  # group and "module.buffer" to the name of the stored tensor


def numbered(group: int, name: str) -> str:
    """The names of a file that holds nothing but sets: "0.blocks.1.attn1.to_q.qweight"."""
    return f"{group}.{name}"


class Ready(NamedTuple):
    """A module's buffers of one set, and what it makes of them."""

    buffers: dict[str, Tensor]
    prepared: Any


class SwitchedSets:
    """Swaps the buffers of quantized layers when sampling enters another time group.

    The sets stand in one file or in the shards of a checkpoint, memory-mapped; `name` tells what a tensor is called there.
    With the `denoiser` that the modules are of, its blocks wait on a GPU each for their own copy, else all for all of them.
    `engine` stands in for that of the device.
    """

    def __init__(
        self,
        files: Path | Sequence[Path],
        modules: Mapping[str, nn.Module],
        name: SetName = numbered,
        *,
        denoiser: nn.Module | None = None,
        engine: Callable[[torch.device], Engine] | None = None,
    ) -> None:
        self.files = (files,) if isinstance(files, Path) else tuple(files)
        self.active = self._ahead = 0
        self.modules = dict(modules)
        self._seconds: list[float] = []
        self._unread: list[Callable[[], float]] = []
        self._name, self._engine = name, engine
        # Weak, because the denoiser holds these sets by the hook that follows its timestep.
        self._denoiser = None if denoiser is None else weakref.ref(denoiser)
        # Names, not tensors: moving a model to another device puts new tensors in the place of its buffers.
        self._keys = {prefix: tuple(set_buffers(module)) for prefix, module in modules.items()}
        self._targets = [f"{prefix}.{key}" for prefix, keys in self._keys.items() for key in keys]
        self._stored = MappedFiles(self.files)
        self._reader = Reader()
        self._ready: dict[int, dict[str, Ready]] = {}
        self._on_devices: dict[torch.device, DeviceSets] = {}
        first = next(iter(self._targets), None)
        self.count = 0 if first is None else _sets_of(first, self._stored.places, name)
        self._prefetch()

    @property
    def nbytes(self) -> int:
        """Size of the files with all sets."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def swap_seconds(self) -> list[float]:
        """What each swap took: on a CPU of the sampling thread, on a GPU from its first copy to its last, which is more than
        was waited for where blocks compute meanwhile. Reading it waits for copies under way.
        """
        self._seconds += [swap() for swap in self._unread]
        self._unread.clear()
        return list(self._seconds)

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
        taken: list[Callable[[], float]] = []
        by_device = self._by_device()
        for device in [device for device in self._on_devices if device not in by_device]:
            self._on_devices.pop(device).close()
        for device, prefixes in by_device.items():
            if device.type == "cuda" or self._engine is not None:
                taken.append(self._device_sets(device, prefixes).bring(group))
            else:
                self._exchange(group, device, prefixes)
        stale = {self.active, self._ahead} - {group}
        self.active = group
        self._prefetch(stale)
        seconds = time.perf_counter() - started
        self._unread.append(lambda: max(seconds, *(swap() for swap in taken)) if taken else seconds)

    def settle(self) -> None:
        """Let a GPU's computation wait for the whole set, before a CUDA graph recorded by hand is replayed after a swap."""
        for sets in self._on_devices.values():
            sets.settle()

    def _by_device(self) -> dict[torch.device, list[str]]:
        """The modules by the device that their buffers are on; StorageError if one was offloaded."""
        found: dict[torch.device, list[str]] = defaultdict(list)
        for prefix, keys in self._keys.items():
            held = next((self.modules[prefix]._buffers[key] for key in keys), None)
            if keys and (held is None or held.is_meta):
                raise StorageError(
                    f"{prefix}: switched sets need their layers in memory, and this one was offloaded with its buffers; "
                    'use enable_model_cpu_offload, or a recipe with storage "resident".'
                )
            if keys:
                found[held.device].append(prefix)
        return found

    def _exchange(self, group: int, device: torch.device, prefixes: Sequence[str]) -> None:
        """Pointers on a CPU; on a device without a copy engine of ours, a copy that waits."""
        ready = self._look_up(group)
        for prefix in prefixes:
            module, (buffers, prepared) = self.modules[prefix], ready[prefix]
            if device.type == "cpu":
                module.take(buffers, prepared)
                continue
            for key in buffers:
                module._buffers[key].copy_(self._fitting(group, f"{prefix}.{key}"))
            module.refresh()

    def _device_sets(self, device: torch.device, prefixes: Sequence[str]) -> DeviceSets:
        """What swaps the modules on a GPU, made anew where they were moved since."""
        found = self._on_devices.get(device)
        if found is None or not found.fits() or list(found.keys) != list(prefixes):
            if found is not None:
                found.close()
            modules = {prefix: self.modules[prefix] for prefix in prefixes}
            keys = {prefix: self._keys[prefix] for prefix in prefixes}
            engine = (self._engine or CudaEngine)(device)
            denoiser = None if self._denoiser is None else self._denoiser()
            found = self._on_devices[device] = DeviceSets(modules, keys, self._fitting, engine, denoiser)
        return found

    def _fitting(self, group: int, name: str) -> Tensor:
        """A stored buffer in the layout of the one that it goes into: a file may have been written for another device."""
        prefix, _, key = name.rpartition(".")
        module, stored = self.modules[prefix], self.tensor(group, name)
        if key == "qweight" and stored.shape != module._buffers[key].shape:
            return module.laid_out(stored)
        return stored

    def _look_up(self, group: int) -> dict[str, Ready]:
        """A set as the layers take it, by module; made once, since views of the file hold no memory of their own."""
        if group in self._ready:
            return self._ready[group]
        ready, views = {}, True
        for prefix, keys in self._keys.items():
            buffers = {}
            for key in keys:
                name = f"{prefix}.{key}"
                buffers[key] = self._fitting(group, name)
                views &= buffers[key].shape == self._stored.places[self._name(group, name)].shape
                time.sleep(0)  # lets the sampling thread have the interpreter at once
            if buffers:
                ready[prefix] = Ready(buffers, self.modules[prefix].prepare(buffers))
            time.sleep(0)
        if views:
            self._ready[group] = ready
        return ready

    def _ranges(self, group: int) -> list[Range]:
        return self._stored.ranges(self._name(group, name) for name in self._targets)

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
                stored.release(owner._ranges(group))
            ranges = owner._ranges(coming)
            if owner._on_devices:
                for there in owner._on_devices.values():
                    there.stage(coming)
                stored.release(ranges)  # they are in page-locked memory now
                return
            if any(part.device.type == "cpu" for module in owner.modules.values() for part in module.buffers()):
                owner._look_up(coming)
            stored.touch(ranges)

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
