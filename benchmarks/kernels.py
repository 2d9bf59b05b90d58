"""Times the CPU kernels beside their bounds and beside float32, round by round so that every call meets the same noise.

    python -m benchmarks.kernels                          # the standard shapes, printed
    python -m benchmarks.kernels --add                    # and taken into benchmarks/results.csv
    python -m benchmarks.kernels --shapes 128x256x1024 --rounds 50 --threads 1

A shape is tokens x in_features x out_features. Times of the integer calls include quantizing the activation unless the
name says "alone". The bound of a call is the larger of its bytes over the copy bandwidth and its operations over the peaks
of the units, all three measured in the same run; its share is bound / median. Small operands stay in cache and can beat a
bound of bytes. A speed is the median, over rounds, of the first call's time over this one's in the same round.

On a machine that others use too, --threads 1 --clock cpu counts only the time in which the calls really ran.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.kernel_cases import Case, attention_cases, linear_cases
from benchmarks.tables import RESULTS, add_rows
from trdq_core.kernels import dispatch
from trdq_core.profiling import machine
from trdq_core.step_profile import Peaks, measured_peaks

SHAPES = ("128x256x1024", "512x384x1536", "512x1536x384", "512x1152x4608", "512x4608x1152")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MIN_BATCH_SECONDS = 2e-3  # short calls are repeated inside one timing, so that the clock's own cost vanishes


class Timing(NamedTuple):
    """Microseconds a call of one case over all rounds, its speed against the first, and the share of its bound."""

    case: Case
    median: float
    p10: float
    p90: float
    rounds: int
    speed: float
    bound_share: float | None


def measure(cases: Sequence[Case], rounds: int, clock: Callable[[], float], peaks: Peaks) -> list[Timing]:
    """Timings of the cases, interleaved: every round runs each case once, the order turning."""
    repeats = [_repeats(case.call) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds):
        for place in range(len(cases)):
            index = (place + turn) % len(cases)
            started = clock()
            for _ in range(repeats[index]):
                cases[index].call()
            times[index].append(1e6 * (clock() - started) / repeats[index])
    return [_summary(case, own, times[0], peaks) for case, own in zip(cases, times, strict=True)]


def bound_us(case: Case, peaks: Peaks) -> float | None:
    """The least microseconds that the case's work takes at the peaks; None where either is unknown."""
    if case.work is None or not peaks.float_operations_per_s or not peaks.integer_operations_per_s:
        return None
    compute = case.work.integer_operations / peaks.integer_operations_per_s
    compute += case.work.float_operations / peaks.float_operations_per_s
    return 1e6 * max(case.work.bytes / peaks.copy_bytes_per_s, compute)


def rows_of(title: str, timings: Sequence[Timing], note: str) -> list[dict[str, object]]:
    """Rows of results.csv."""
    found = machine()
    head = {
        "date": datetime.date.today().isoformat(),
        "device": found["cpu"],
        "threads": found["threads"],
        "model": title,
        "note": note,
    }
    rows: list[dict[str, object]] = []
    for timing in timings:
        spread = {"value": round(timing.median, 2), "low": round(timing.p10, 2), "high": round(timing.p90, 2)}
        numbers: dict[str, dict[str, object]] = {
            "call_us": spread,
            "call_speed": {"value": round(timing.speed, 3), "low": "", "high": ""},
        }
        if timing.bound_share is not None:
            numbers["bound_share"] = {"value": round(timing.bound_share, 4), "low": "", "high": ""}
        common = {**head, "recipe": timing.case.name, "n": timing.rounds}
        rows += [{**common, "metric": metric, **cells} for metric, cells in numbers.items()]
    return rows


def print_timings(title: str, timings: Sequence[Timing]) -> None:
    """A table for people."""
    print(f"\n{title}\n{'call':58}{'median us':>11}{'p10':>10}{'p90':>10}{'n':>5}{'x first':>9}{'of bound':>10}")
    for timing in timings:
        numbers = f"{timing.median:>11.1f}{timing.p10:>10.1f}{timing.p90:>10.1f}{timing.rounds:>5}{timing.speed:>9.2f}"
        share = "" if timing.bound_share is None else f"{timing.bound_share:>10.2f}"
        print(f"{timing.case.name:58}{numbers}{share}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="MxKxN")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time on the CPU, for one thread")
    parser.add_argument("--add", action="store_true", help="take the figures into benchmarks/results.csv")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that --add writes to")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu adds up the threads' times; use it with --threads 1")
    described, peaks = dispatch.describe(), measured_peaks()
    note = (
        f"copy {peaks.copy_bytes_per_s / 1e9:.0f} GB/s, float32 {(peaks.float_operations_per_s or 0) / 1e9:.0f} and int8 "
        f"{(peaks.integer_operations_per_s or 0) / 1e9:.0f} GOP/s measured, {described['path']} kernels"
    )
    print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}; {note}")
    rows = []
    for shape in options.shapes:
        tokens, width, outputs = (int(part) for part in shape.split("x"))
        with torch.inference_mode():
            for kind, cases in (
                ("linear", linear_cases(tokens, width, outputs)),
                ("attention", attention_cases(tokens, width) if width < outputs else []),
            ):
                timings = measure(cases, options.rounds, CLOCKS[options.clock], peaks) if cases else []
                title = f"CPU kernels, {kind} {shape if kind == 'linear' else f'{tokens}x{width}'}"
                if timings:
                    print_timings(title, timings)
                    rows += rows_of(title, timings, note)
    if options.add:
        add_rows(rows, options.out)


def _repeats(call: Callable[[], object]) -> int:
    for _ in range(3):
        call()
    started = time.perf_counter()
    call()
    return max(1, int(MIN_BATCH_SECONDS / max(time.perf_counter() - started, 1e-7)))


def _summary(case: Case, own: list[float], first: list[float], peaks: Peaks) -> Timing:
    ordered = sorted(own)
    last, median = len(ordered) - 1, statistics.median(ordered)
    speed = statistics.median(other / mine for other, mine in zip(first, own, strict=True))
    bound = bound_us(case, peaks)
    share = None if bound is None else bound / median
    return Timing(case, median, ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(own), speed, share)


if __name__ == "__main__":
    main()
