"""Seeing the C++ kernels at work: which calls a model makes, and how long each phase inside of them takes."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trdq_core.kernels import calls, native
from trdq_core.kernels.types import InputStages, PackedWeight

ENTRIES = ("transform_rows", "quantize_rows", "product", "linears_from_float", "attend")
PEAK_ROUNDS = 300_000  # about a millisecond
PHASES = ("before", "transform", "quantize", "multiply", "attend")  # in the order of the library's numbers


class Work(NamedTuple):
    """What one call has to do at least: operations of each unit, and bytes that come from or go to memory."""

    name: str
    integer_operations: int
    float_operations: int
    bytes: int


class Call(NamedTuple):
    """One call of a kernel that was seen; `repeat` does the same again."""

    work: Work
    repeat: Callable[[], Any]


@contextmanager
def observed(on_call: Callable[[Call], None]) -> Iterator[None]:
    """Hand every call of the C++ kernels to `on_call` before it runs, named for torch's profiler as well.

    While this is open the calls of all threads are seen; not for use beside another measurement.
    """
    originals = {name: getattr(calls, name) for name in ENTRIES}
    for name, original in originals.items():
        setattr(calls, name, _watched(name, original, on_call))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(calls, name, original)


@contextmanager
def timed_phases() -> Iterator[Callable[[], dict[str, float]]]:
    """Have the library time its phases; the function given back tells milliseconds of wall time so far, by phase.

    The wall time of each product, transform or attention is split as its team of threads, however large, spent it; together
    the phases are the time of the calls without what Python adds. Nothing without the library.
    """
    loaded = native.loaded()
    if loaded is None:
        yield dict
        return
    functions = loaded.functions

    def read() -> dict[str, float]:
        found = (ctypes.c_int64 * len(PHASES))()
        functions.trdq_phases(found)
        return {name: value / 1e6 for name, value in zip(PHASES, found, strict=True)}

    functions.trdq_measure(1)
    try:
        yield read
    finally:
        functions.trdq_measure(0)


def peak_operations(unit: int) -> float | None:
    """Operations a second that this CPU's unit 0 (float32) or 1 (8 bits) does at most, all threads together.

    The best of many short runs, so that one of them is left alone by whatever else the machine does. None without the
    library, or where its path has no such loop.
    """
    loaded = native.loaded()
    if loaded is None:
        return None
    done, best = ctypes.c_int64(), 0.0
    for _ in range(40):
        started = time.perf_counter()
        loaded.functions.trdq_peak(unit, PEAK_ROUNDS, torch.get_num_threads(), ctypes.byref(done))
        best = max(best, done.value / (time.perf_counter() - started))
    return best or None


def _watched(name: str, original: Callable[..., Any], on_call: Callable[[Call], None]) -> Callable[..., Any]:
    @wraps(original)
    def call(library: ctypes.CDLL, *arguments: Any, **named: Any) -> Any:
        work = _WORK[name](*arguments, **named)
        on_call(Call(work, lambda: original(library, *arguments, **named)))
        with torch.profiler.record_function(f"trdq: {work.name}"):
            return original(library, *arguments, **named)

    return call


def _stage_operations(x: Tensor, stages: InputStages) -> int:
    widths = [0 if matrix is None else 2 * matrix.shape[0] for matrix in (stages.rotation, stages.second_rotation)]
    steps = math.log2(stages.hadamard_block) if stages.hadamard_block else 0
    return int(x.numel() * (sum(widths) + steps))


def _stage_words(stages: InputStages) -> str:
    parts = {
        "scale": stages.inverse_scale is not None,
        f"R{0 if stages.rotation is None else stages.rotation.shape[0]}": stages.rotation is not None,
        "permute": stages.permutation is not None,
        f"H{stages.hadamard_block}": bool(stages.hadamard_block),
        f"R{0 if stages.second_rotation is None else stages.second_rotation.shape[0]} ": stages.second_rotation
        is not None,
    }
    return ", ".join(name.strip() for name, there in parts.items() if there)


def _transform_work(x: Tensor, stages: InputStages, prologue: Any = None) -> Work:
    return Work(f"transform {x.shape[0]}x{x.shape[1]}", 0, _stage_operations(x, stages), 8 * x.numel())


def _quantize_work(x: Tensor, stages: InputStages, *_: Any, **__: Any) -> Work:
    words = " + ".join(part for part in ("quantize", _stage_words(stages)) if part)
    return Work(f"{words} {x.shape[0]}x{x.shape[1]}", 0, _stage_operations(x, stages), 5 * x.numel())


def _weight_bytes(weight: PackedWeight) -> int:
    return sum(part.nbytes for part in weight if isinstance(part, Tensor))


def _product_work(activation: Any, weight: PackedWeight, bias: Tensor | None) -> Work:
    tokens, out = activation.values.shape[0], weight.out_features
    size = activation.values.numel() + _weight_bytes(weight) + 4 * tokens * out
    name = f"product W{weight.bits} {tokens}x{weight.in_features}x{out}"
    return Work(name, 2 * tokens * weight.in_features * out, 0, size)


def _linears_work(
    x: Tensor, stages: InputStages, weights: Any, bits: int, symmetric: bool, static: Any = None, clip: float = 1.0,
    prologue: Any = None, epilogue: Any = None,
) -> Work:  # fmt: skip
    tokens, width = x.shape
    out = sum(weight.out_features for weight, _ in weights)
    size = 4 * x.numel() + sum(_weight_bytes(weight) for weight, _ in weights) + 4 * tokens * out
    size += 0 if epilogue is None else 4 * tokens * out
    around = [None if prologue is None else prologue.kind, _stage_words(stages), "quantize"]
    after = "" if epilogue is None else " + residual"
    words = " + ".join(part for part in around if part)
    name = f"{words}, linear W{weights[0][0].bits} {tokens}x{width}x{out}{after}"
    return Work(name, 2 * tokens * width * out, _stage_operations(x, stages), size)


def _attend_work(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, bits: int = 0) -> Work:
    items, rows, channels = q.shape
    operations = 4 * items * rows * k.shape[1] * channels
    size = 4 * (2 * q.numel() + k.numel() + v.numel())
    name = f"attention {'int8' if bits else 'float32'} {items}x{heads}, {rows}x{k.shape[1]}x{channels // heads}"
    return Work(name, operations if bits else 0, 0 if bits else operations, size)


_WORK: dict[str, Callable[..., Work]] = {
    "transform_rows": _transform_work,
    "quantize_rows": _quantize_work,
    "product": _product_work,
    "linears_from_float": _linears_work,
    "attend": _attend_work,
}
