"""Bytes that a converted module holds and would save, and which products it really computes, seen while it runs."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import profiler_legacy

from trdq_core.nn.modules import tensor_bytes
from trdq_core.peers.base import Call

# Integer products as torch's profiler names them. Whatever else multiplies does it in floating point.
INTEGER_PRODUCTS = {
    "aten::_int_mm": "int8 x int8, torch._int_mm",
    "sdnq::openvino_int_mm": "int8 x int8, OpenVINO",
}


def parts(tensors: Iterable[Tensor | None]) -> Iterator[Tensor]:
    """The plain tensors inside tensor subclasses, and plain ones as they are."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from parts(getattr(tensor, name) for name in names)
        else:
            yield tensor


def held_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared storage counted once, tensor subclasses by what they hold."""
    return tensor_bytes(parts(t for module in modules for t in (*module.parameters(), *module.buffers())))


def weight_bytes(module: nn.Module, layers: Sequence[str]) -> int:
    """Bytes of some layers without their biases, scales included: counted as those of the recipes are."""
    found = [module.get_submodule(name) for name in layers]
    biases = {id(layer.bias) for layer in found if layer.bias is not None}
    tensors = (t for layer in found for t in (*layer.parameters(), *layer.buffers()) if id(t) not in biases)
    return tensor_bytes(parts(tensors))


def file_bytes(module: nn.Module) -> int:
    """Bytes of the file that `torch.save` makes of the state; nothing is written to the disk."""
    counter = _Counter()
    torch.save(module.state_dict(), counter)
    return counter.count


@torch.no_grad()
def kernels_of(module: nn.Module, example: Call, layers: Sequence[str]) -> dict[str, int]:
    """How many products of one call ran in integers, by kernel; what is left of `layers` did so in floating point.

    The profiler of before Kineto, which writes lines of its own to the terminal.
    """
    module(**example)  # what compiles at its first call traces its products then
    with profiler_legacy.profile() as profile:
        module(**example)
    counted = {event.key: event.count for event in profile.key_averages()}
    found = {words: counted[name] for name, words in INTEGER_PRODUCTS.items() if counted.get(name)}
    rest = len(layers) - sum(found.values())
    if rest > 0:
        tensor = next(t for t in example.values() if isinstance(t, Tensor))
        dtype = str(tensor.dtype).removeprefix("torch.")
        # The list above is that of a CPU; a tool's own kernels on a GPU are not told from others by their names.
        seen = f"multiplied in {dtype}" if tensor.device.type == "cpu" else "product unknown"
        found[f"int8 weights, {seen}"] = rest
    return found


class Compiled(NamedTuple):
    """What torch.compile did: frames it compiled, those it gave up (for a recompile limit, for one), and breaks of a graph."""

    frames: int
    given_up: int
    graph_breaks: int


def compiled_so_far() -> Compiled:
    """Of this process, from Dynamo's own counters; all 0 where it was never used."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compiled(0, 0, 0)
    counters = dynamo.counters
    tried, done = counters["frames"]["total"], counters["frames"]["ok"]
    return Compiled(done, tried - done, sum(counters["graph_break"].values()))


def compiled_since(before: Compiled) -> Compiled:
    """What was compiled and given up since `before`."""
    return Compiled(*(now - then for now, then in zip(compiled_so_far(), before, strict=True)))


class _Counter(io.RawIOBase):
    """A file that only counts what is written."""

    count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        self.count += size
        return size
