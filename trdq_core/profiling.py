"""Time and memory, measured the careful way: warm-up, interleaved variants, median with spread, peaks reset before."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from trdq_core.allocator import release_free_memory

WARM_UP = 3


def summary(milliseconds: Sequence[float]) -> dict[str, float | int]:
    """Median, 10th and 90th percentile and count of timings in ms."""
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return {
        "median": round(statistics.median(ordered), 3),
        "p10": round(ordered[round(0.1 * last)], 3),
        "p90": round(ordered[round(0.9 * last)], 3),
        "n": len(ordered),
    }


@torch.no_grad()
def time_interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, after_round: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of every call of every variant, one of each in a round, so that drift of the machine hits all alike.

    Warm-up first. The order is another one in each round: see `round_order`.
    """
    for _ in range(WARM_UP):
        for call in variants.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in round_order(names, turn):
            _synchronize()
            started = time.perf_counter()
            variants[name]()
            _synchronize()
            times[name].append(1000 * (time.perf_counter() - started))
        if after_round is not None:
            after_round()
    return times


def round_order(names: Sequence[str], turn: int) -> list[str]:
    """The order of one round: within `len(names)` rounds each name stands once at each place, after ever other names.

    So none always finds the caches, and the threads still spinning, of the same predecessor. Rows of a Latin square balanced
    for what one leaves to the next (Williams 1949): 0, 1, n-1, 2, n-2, ... moved on by one each round, and for an odd n every
    other n rounds backwards.
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else (count - place // 2) % count for place in range(count)]
    order = [names[(index + turn) % count] for index in zigzag]
    return order[::-1] if count % 2 and (turn // count) % 2 else order


def ratios(times: Sequence[float], others: Sequence[float]) -> dict[str, float | int]:
    """How many times as long `others` took as `times`, round by round: median, percentiles and count of the ratios."""
    return summary([other / own for own, other in zip(times, others, strict=True)])


def record_inputs(denoiser: nn.Module, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The keyword arguments of every forward call of `denoiser` while `run` samples, positional ones by their names."""
    names = list(inspect.signature(denoiser.forward).parameters)
    calls: list[dict[str, Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


def reset_peak_memory() -> None:
    """Start a new measurement of the process's peak resident memory (Linux), and of CUDA's.

    Memory that is free but still held by the allocator goes back to the system first, or the next peak would count it.
    """
    gc.collect()
    release_free_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since the last reset; since its start where the system cannot reset it."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return psutil.Process().memory_info().rss


def machine() -> dict[str, Any]:
    """What ran: CPU, threads, memory, GPU."""
    cpu = "unknown"
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
