"""Each kernel call of a step beside its lower bound: bytes over the measured bandwidth, operations over the measured peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from trdq_core.kernels.observing import Call, observed, peak_operations

COPY_BYTES = 1 << 26  # far beyond the last-level cache of the machines at hand
REPEATS = 9


class Peaks(NamedTuple):
    """What this machine does at most, measured: None where it could not be."""

    copy_bytes_per_s: float  # read and written
    float_operations_per_s: float | None
    integer_operations_per_s: float | None
    threads: int


def measured_peaks() -> Peaks:
    """Best of some runs each: a large copy, and loops of float32 multiply-adds and 8-bit dot products in registers."""
    source, target = torch.zeros(COPY_BYTES // 4), torch.zeros(COPY_BYTES // 4)
    best = min(_seconds(lambda: target.copy_(source)) for _ in range(REPEATS))
    return Peaks(2 * COPY_BYTES / best, peak_operations(0), peak_operations(1), torch.get_num_threads())


@torch.no_grad()
def roofline(step: Callable[[], Any], peaks: Peaks, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """The kernel calls of one step, equal ones together: how often, milliseconds of one, its bound, and the share of it.

    Each is called again by itself, with the arguments that it had, and the median of `repeats` counts: so its operands are
    in cache as far as they fit, and may be faster than memory allows. "bound_ms" is the larger of the time of its bytes
    and of its operations. Empty where the C++ kernels do not run.
    """
    first: dict[str, Call] = {}
    counts: dict[str, int] = {}

    def see(call: Call) -> None:
        first.setdefault(call.work.name, call)
        counts[call.work.name] = counts.get(call.work.name, 0) + 1

    with observed(see):
        step()
    rows = [_row(call, counts[name], peaks, repeats) for name, call in first.items()]
    return sorted(rows, key=lambda row: -row["calls"] * row["ms"])


def _row(call: Call, count: int, peaks: Peaks, repeats: int) -> dict[str, Any]:
    call.repeat()
    seconds = statistics.median(_seconds(call.repeat) for _ in range(repeats))
    work = call.work
    memory = work.bytes / peaks.copy_bytes_per_s
    compute = _over(work.integer_operations, peaks.integer_operations_per_s)
    compute += _over(work.float_operations, peaks.float_operations_per_s)
    bound = max(memory, compute)
    operations = work.integer_operations + work.float_operations
    return {
        "op": work.name,
        "calls": count,
        "ms": round(1000 * seconds, 5),
        "operations": operations,
        "bytes": work.bytes,
        "operations_per_byte": round(operations / work.bytes, 3) if work.bytes else 0.0,
        "operations_per_s": round(operations / seconds),
        "bytes_per_s": round(work.bytes / seconds),
        "bound": "compute" if compute > memory else "memory",
        "bound_ms": round(1000 * bound, 5),
        "share_of_bound": round(bound / seconds, 4),
    }


def _over(operations: int, peak: float | None) -> float:
    return operations / peak if peak else 0.0


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
