"""Switched sets on a GPU: the next set waits in page-locked memory, and reaches the device block by block.

While one time group is at work, a thread copies the next set from the mapped file into page-locked memory of the host.
Entering the group hands the copies to a stream of their own, one block of the denoiser after the other, into the memory of
the set before. They begin when the work given before is done; a block's computation waits for the copy of that block alone,
while the others arrive. So the device holds one set, and one block more while its buffers are first laid side by side; the
host holds one set page-locked. Addresses stay, so CUDA graphs that were recorded stay valid.

Never run on a GPU so far: the order of copies and waits is tested with a copy engine that copies as late as it may.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what CUDA allocates at, so that kernels may assume of a buffer what they may of a tensor

Read = Callable[[int, str], Tensor]  # group and "module.buffer" to the stored tensor, in the layout of the buffer


class Engine(Protocol):
    """Copies to a device beside its computation. A mark is a place in the order of one of the two."""

    def page_locked(self, size: int) -> Tensor:
        """Host memory (size,) uint8 that copies run from by themselves."""

    def begin(self) -> Any:
        """Let copies given from now on wait for the computation given so far; the mark of that."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy when those given before are done; does not wait."""

    def mark(self) -> Any:
        """Where the copies given so far are done."""

    def hold_computation(self, mark: Any) -> None:
        """Let computation given from now on wait for a mark."""

    def hold_host(self, mark: Any) -> None:
        """Wait for a mark."""

    def seconds(self, first: Any, last: Any) -> float:
        """What lay between two marks; waits for the last."""


class CudaEngine:
    """The copy engine of an NVIDIA GPU: a side stream and events. Nothing touches CUDA before one is made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)

    def page_locked(self, size: int) -> Tensor:
        """Ordinary memory where the system locks no more: copies from there are right, and hold the host."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return torch.empty(size, dtype=torch.uint8)

    def begin(self) -> torch.cuda.Event:
        """See `Engine`."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        self._copies.wait_event(mark)
        return mark

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Engine`."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        target.record_stream(self._copies)  # or its memory could be given away before, when nobody holds it any more

    def mark(self) -> torch.cuda.Event:
        """See `Engine`."""
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(self._copies)
        return mark

    def hold_computation(self, mark: torch.cuda.Event) -> None:
        """See `Engine`."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def hold_host(self, mark: torch.cuda.Event) -> None:
        """See `Engine`."""
        mark.synchronize()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """See `Engine`."""
        last.synchronize()
        return first.elapsed_time(last) / 1000


class Part(NamedTuple):
    """One swapped buffer: of which module, and where it lies in the memory of its block, on either side."""

    name: str
    module: nn.Module
    key: str
    here: weakref.ref[Tensor]  # what the module's buffer is: a view of the block's memory on the device
    waiting: Tensor  # view of its page-locked memory


@dataclass(eq=False)
class Block:
    """The swapped buffers of one block of the denoiser, side by side in one piece of memory on the device and on the host.

    The memory on the device belongs to the modules' buffers alone: it is gone when the model is moved.
    """

    parts: list[Part]
    waiting: Tensor
    # How far the block is, as its hook knows: whether a copy is on its way, and whether the hook ran since the last swap.
    mark: Any = None
    coming: bool = False
    called: bool = False
    watched: bool = False

    def memory(self) -> Tensor:
        """The whole memory on the device, (bytes,) uint8."""
        storage = self.parts[0].module._buffers[self.parts[0].key].untyped_storage()
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@dataclass(eq=False)
class DeviceSets:
    """The swapped buffers of modules on one device, filled by `read`; `denoiser` is where their blocks are found."""

    modules: Mapping[str, nn.Module]
    keys: Mapping[str, tuple[str, ...]]  # of each module, its swapped buffers
    read: Read
    engine: Engine
    denoiser: nn.Module | None = None
    staged: int | None = None  # the group whose set lies in page-locked memory
    _blocks: list[Block] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)
    _last: Any = None

    def __post_init__(self) -> None:
        by_block: dict[str, list[tuple[str, str]]] = {"": []}  # what is in no block comes first: nothing watches it
        for prefix, keys in self.keys.items():
            by_block.setdefault(block_of(prefix), []).extend((prefix, key) for key in keys)
        for name, members in by_block.items():
            if members:
                block = self._lay_out(members)
                self._blocks.append(block)
                self._watch(name, block)

    def fits(self) -> bool:
        """Whether the buffers are still those that were laid out: a model that was moved has others."""
        return all(part.module._buffers[part.key] is part.here() for block in self._blocks for part in block.parts)

    def stage(self, group: int) -> None:
        """Bring the set of `group` into page-locked memory, when the copies from there are done. Any thread may."""
        if self.staged == group:
            return
        if self._last is not None:
            self.engine.hold_host(self._last)
        self.staged = None
        for part in itertools.chain.from_iterable(block.parts for block in self._blocks):
            part.waiting.copy_(self.read(group, part.name))
        self.staged = group

    def bring(self, group: int) -> Callable[[], float]:
        """Give the copies of a set to the device; what comes back waits for them and says how many seconds they took.

        A set that nobody foresaw is read first. Blocks whose hook ran since the last swap wait for their copy in it. Those
        whose hook did not, as in a graph that replays, wait here.
        """
        self.stage(group)
        began = self.engine.begin()
        for block in self._blocks:
            self.engine.copy(block.memory(), block.waiting)
            block.mark = self._last = self.engine.mark()
            block.coming = block.called and block.watched
            if not block.coming:
                self.engine.hold_computation(block.mark)
            block.called = False
            for part in block.parts:
                part.module.refresh()
        engine, last = self.engine, self._last
        return lambda: engine.seconds(began, last)

    def settle(self) -> None:
        """Let computation wait for every copy, before a CUDA graph recorded by hand is replayed: it runs no hooks."""
        for block in self._blocks:
            self._open(block)

    def close(self) -> None:
        """Wait for what is under way and take the hooks away."""
        self.settle()
        for handle in self._handles:
            handle.remove()

    @torch.inference_mode(False)  # or later swaps outside of it could not write into this memory
    def _lay_out(self, members: list[tuple[str, str]]) -> Block:
        """The block's buffers as views of one piece of memory, with what they hold now."""
        buffers = [self.modules[prefix]._buffers[key] for prefix, key in members]
        ends = list(itertools.accumulate(-(-buffer.nbytes // ALIGNMENT) * ALIGNMENT for buffer in buffers))
        here = torch.empty(ends[-1], dtype=torch.uint8, device=buffers[0].device)
        waiting = self.engine.page_locked(ends[-1])
        parts = []
        for (prefix, key), buffer, begin in zip(members, buffers, (0, *ends), strict=False):
            module = self.modules[prefix]
            mine, theirs = (
                side[begin : begin + buffer.nbytes].view(buffer.dtype).view(buffer.shape) for side in (here, waiting)
            )
            parts.append(Part(f"{prefix}.{key}", module, key, weakref.ref(mine), theirs))
            module._buffers[key] = mine.copy_(buffer)
            module.refresh()
        return Block(parts, waiting)

    def _watch(self, name: str, block: Block) -> None:
        module = None if self.denoiser is None or not name else self.denoiser.get_submodule(name)
        if module is None:
            return

        def before_forward(*_: object) -> None:
            if not torch.compiler.is_compiling():
                block.called = True
            if (
                block.coming
            ):  # torch.compile guards on it, so a graph made without the wait is not used where one is due
                self._open(block)

        block.watched = True
        self._handles.append(module.register_forward_pre_hook(before_forward, prepend=True))

    @torch.compiler.disable
    def _open(self, block: Block) -> None:
        if block.coming:
            self.engine.hold_computation(block.mark)
            block.coming = False


def block_of(name: str) -> str:
    """The block that a module belongs to, "transformer_blocks.3" of "transformer_blocks.3.attn1.to_q"; "" outside of any."""
    parts = name.split(".")
    index = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if index is None else ".".join(parts[: index + 1])
