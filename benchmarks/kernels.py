"""Times the quantized linear against float32, round by round so that every call meets the same noise.

    python -m benchmarks.kernels                          # the standard shapes, printed
    python -m benchmarks.kernels --out results.csv        # and appended, one row per call and shape
    python -m benchmarks.kernels --shapes 128x256x1024 --rounds 50 --threads 1

A shape is tokens x in_features x out_features. Times of the integer calls include quantizing the activation unless the
name says "only". There are two float32 baselines: `F.linear`, which is what a model runs, and oneDNN with a prepacked
weight, which is the best that this machine's float32 can do (on AMD, `F.linear` leaves half of it unused). A ratio is the
median, over rounds, of baseline time / call time inside the same round: above 1 is faster than the baseline.

On a machine that others use too, --threads 1 --clock cpu counts only the time in which the calls really ran.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from trdq_core import __version__
from trdq_core.kernels import build, dispatch
from trdq_core.kernels.types import NO_STAGES, InputStages, PackedWeight

SHAPES = ("128x256x1024", "128x1024x256", "512x384x1536", "512x1536x384", "512x1152x4608")
GROUP = 128
BLOCK = 128
BASELINES = ("fp32 F.linear", "fp32 oneDNN, prepacked")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MIN_BATCH_SECONDS = 2e-3  # short calls are repeated inside one timing, so that the clock's own cost vanishes


class Case(NamedTuple):
    """One call to time and the name of the kernel that runs in it."""

    name: str
    kernel: str
    call: Callable[[], object]


class Timing(NamedTuple):
    """Seconds per call of one case over all rounds, and its speed against the two baselines."""

    case: Case
    median: float
    p10: float
    p90: float
    rounds: int
    ratio: float
    ratio_to_best: float


def make_cases(tokens: int, in_features: int, out_features: int) -> list[Case]:
    """The calls compared at one shape; the two float32 baselines come first."""
    torch.manual_seed(0)
    x, bias = torch.randn(tokens, in_features), torch.randn(out_features)
    weight = torch.randn(out_features, in_features)
    backend = dispatch.select_backend(torch.device("cpu"))
    int8, int4 = _pack_int8(weight), _pack_int4(weight)
    name8, name4 = dispatch.kernel_name(8, 8, backend), dispatch.kernel_name(4, 8, backend)
    levels = dispatch.quantize_activation(x, NO_STAGES, 8, True)
    hadamard = InputStages(hadamard_block=BLOCK)
    two_rotations = _two_rotations(in_features)
    from_float = dispatch.linear_from_float
    return [
        Case(BASELINES[0], "torch float32", lambda: functional.linear(x, weight, bias)),
        Case(BASELINES[1], "oneDNN float32", _prepacked_call(x, weight, bias)),
        Case("int8", name8, lambda: from_float(x, NO_STAGES, int8, bias, 8, True)),
        Case("int8, asymmetric input", name8, lambda: from_float(x, NO_STAGES, int8, bias, 8, False)),
        Case("int4 two-level", name4, lambda: from_float(x, NO_STAGES, int4, bias, 8, True)),
        Case("int8 + Hadamard", name8, lambda: from_float(x, hadamard, int8, bias, 8, True)),
        Case(
            "int8 + scale, two rotations, gather",
            name8,
            lambda: from_float(x, two_rotations, int8, bias, 8, True),
        ),
        Case("int8 through torch", dispatch.kernel_name(8, 8, "torch"), _torch_call(x, int8, bias)),
        Case("product only, int8", name8, lambda: dispatch.linear(levels, int8, bias)),
        Case("product only, int4", name4, lambda: dispatch.linear(levels, int4, bias)),
        Case("quantize only", name8, lambda: dispatch.quantize_activation(x, NO_STAGES, 8, True)),
        Case(
            "quantize only, two rotations",
            name8,
            lambda: dispatch.quantize_activation(x, two_rotations, 8, True),
        ),
    ]


def measure(cases: list[Case], rounds: int, clock: Callable[[], float] = time.perf_counter) -> list[Timing]:
    """Timings of the cases, interleaved: every round runs each case once, in turn."""
    repeats = [_repeats(case.call) for case in cases]
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for index, case in enumerate(cases):
            started = clock()
            for _ in range(repeats[index]):
                case.call()
            seconds[index].append((clock() - started) / repeats[index])
    return [_summary(case, own, seconds[:2]) for case, own in zip(cases, seconds, strict=True)]


def append_rows(path: Path, shape: str, clock: str, timings: list[Timing]) -> None:
    """Appends one row per timing, with what is needed to read it later; the header is written once."""
    described = dispatch.describe()
    common = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device_name(),
        "threads": torch.get_num_threads(),
        "torch": described["torch"],
        "trdq": __version__,
        "compiler": described["compiler"],
        "cpu_features": " ".join(build.cpu_features()),
        "clock": clock,
        "shape": shape,
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        rows = [common | _row(timing) for timing in timings]
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="MxKxN")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time on the CPU, for one thread")
    parser.add_argument("--out", type=Path, default=None, help="CSV file to append to")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu adds up the threads' times; use it with --threads 1")
    print(f"{_device_name()}, {torch.get_num_threads()} threads, {dispatch.describe()}")
    for shape in options.shapes:
        tokens, in_features, out_features = (int(part) for part in shape.split("x"))
        with torch.inference_mode():
            timings = measure(make_cases(tokens, in_features, out_features), options.rounds, CLOCKS[options.clock])
        _print_table(shape, timings)
        if options.out is not None:
            append_rows(options.out, shape, options.clock, timings)


def _pack_int8(weight: torch.Tensor) -> PackedWeight:
    scale = weight.abs().amax(dim=1) / 127
    return dispatch.pack_weight((weight / scale[:, None]).round().to(torch.int8), scale, None, None, 8)


def _pack_int4(weight: torch.Tensor) -> PackedWeight:
    groups = weight.unflatten(1, (-1, GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]))
    wanted = groups.abs().amax(dim=2) / 7
    scale = wanted.amax(dim=1) / 16
    group_scale = (wanted / scale[:, None]).round().clamp(1, 16)
    q = (groups / (group_scale * scale[:, None])[:, :, None]).round().clamp(-7, 7).flatten(1)
    return dispatch.pack_weight(q.to(torch.int8), scale, None, group_scale.to(torch.int8), 4)


def _two_rotations(width: int) -> InputStages:
    rotations = [torch.linalg.qr(torch.randn(BLOCK, BLOCK)).Q.contiguous() for _ in range(2)]
    order = torch.randperm(width).to(torch.int32)
    return InputStages(torch.rand(width) + 0.5, rotations[0], order, 0, rotations[1])


def _prepacked_call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable[[], object]:
    if not torch.backends.mkldnn.is_available():
        return lambda: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _torch_call(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor) -> Callable[[], object]:
    return lambda: dispatch.linear_from_float(x, NO_STAGES, weight, bias, 8, True, backend="torch")


def _repeats(call: Callable[[], object]) -> int:
    for _ in range(3):
        call()
    started = time.perf_counter()
    call()
    return max(1, int(MIN_BATCH_SECONDS / max(time.perf_counter() - started, 1e-7)))


def _summary(case: Case, own: list[float], baselines: list[list[float]]) -> Timing:
    ordered = sorted(own)
    last = len(ordered) - 1
    p10, p90 = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    ratios = [
        statistics.median(reference / mine for reference, mine in zip(baseline, own, strict=True))
        for baseline in baselines
    ]
    return Timing(case, statistics.median(own), p10, p90, len(own), *ratios)


def _row(timing: Timing) -> dict[str, object]:
    return {
        "call": timing.case.name,
        "kernel": timing.case.kernel,
        "rounds": timing.rounds,
        "median_us": round(timing.median * 1e6, 1),
        "p10_us": round(timing.p10 * 1e6, 1),
        "p90_us": round(timing.p90 * 1e6, 1),
        "ratio_to_fp32": round(timing.ratio, 3),
        "ratio_to_prepacked_fp32": round(timing.ratio_to_best, 3),
    }


def _print_table(shape: str, timings: list[Timing]) -> None:
    print(f"\n{shape}\n{'call':38}{'median us':>11}{'p10':>10}{'p90':>10}{'n':>5}{'x F.linear':>12}{'x oneDNN':>10}")
    for timing in timings:
        median, p10, p90 = (value * 1e6 for value in timing[1:4])
        print(
            f"{timing.case.name:38}{median:>11.1f}{p10:>10.1f}{p90:>10.1f}{timing.rounds:>5}"
            f"{timing.ratio:>12.2f}{timing.ratio_to_best:>10.2f}"
        )


def _device_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
