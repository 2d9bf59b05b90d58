"""Times the GPU kernels beside their bounds, and a PixArt-XL step; for a machine with an NVIDIA GPU.

    python -m benchmarks.gpu_kernels                        # operators and the whole step, printed
    python -m benchmarks.gpu_kernels --add                  # and taken into benchmarks/results.csv
    python -m benchmarks.gpu_kernels --only operators --shapes 8192x1152x4608

A shape is tokens x in_features x out_features. Every call is recorded in a CUDA graph and replayed, so that what is timed
is the GPU's work and not Python's; calls that cannot be recorded fail, and their row says so. Rounds are interleaved: each
round replays every call once, between CUDA events. The bound of a quantization is its bytes over the copy bandwidth that
the same run measured, the bound of a product is its operations over the best rate of `torch._int_mm` (int8, and fp8, whose
units are as fast on the chips that have both) or of bf16 matmuls in that run, or its bytes over the copy bandwidth where
that is longer.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks.tables import RESULTS, add_rows
from trdq_core.errors import BackendUnavailable, TRDQError
from trdq_core.kernels import dispatch, triton_gpu
from trdq_core.kernels.types import NO_STAGES, InputStages, PackedWeight
from trdq_core.profiling import machine

SHAPES = ("512x1152x4608", "512x4608x1152", "8192x1152x3456", "8192x1152x4608", "8192x4608x1152")
GROUP, BLOCK = 128, 128
COPY_BYTES = 2**29
PEAK_SIDE = 8192
REPLAYS = 10  # per round and call, between two events


class Case(NamedTuple):
    """One call, the bytes it must move and the operations it must do, and the unit that does them."""

    name: str
    call: Callable[[], object]
    bytes: float = 0
    operations: float = 0
    unit: str = "int8"


class Timing(NamedTuple):
    """Microseconds of one call over all rounds, and the bound's share of the median; or why it did not run."""

    name: str
    median: float = 0
    p10: float = 0
    p90: float = 0
    rounds: int = 0
    bound_share: float = 0
    failure: str = ""


class Peaks(NamedTuple):
    """What this GPU reached in this run: bytes and operations a second."""

    copy: float
    int8: float
    bf16: float


def require_gpu() -> torch.device:
    """The GPU; BackendUnavailable with one sentence where the kernels cannot run."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        raise BackendUnavailable("These measurements need an NVIDIA GPU, and torch sees none; nothing was measured.")
    dispatch.select_backend(device, "triton")
    return device


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph; it runs three times before, which also tunes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_calls(calls: dict[str, Callable[[], object]], rounds: int, replays: int = REPLAYS) -> dict[str, list[float]]:
    """Microseconds a call, interleaved: every round runs each call `replays` times, the order turning."""
    names: list[str] = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        at = turn % max(len(names), 1)
        for name in names[at:] + names[:at]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                calls[name]()
            end.record()
            end.synchronize()
            if turn:  # the first round warms up
                found[name].append(1000 * start.elapsed_time(end) / replays)
    return found


def measure_peaks(device: torch.device, rounds: int) -> Peaks:
    """Copy bandwidth, and the best rate of square int8 and bf16 products."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    half = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=torch.bfloat16)
    whole = torch.randint(-128, 128, (PEAK_SIDE, PEAK_SIDE), device=device, dtype=torch.int8)
    calls = {
        "copy": lambda: target.copy_(source),
        "int8": lambda: torch._int_mm(whole, whole.t()),
        "bf16": lambda: half @ half.t(),
    }
    seconds = {name: min(times) / 1e6 for name, times in time_calls(calls, rounds, 3).items()}
    operations = 2 * PEAK_SIDE**3
    return Peaks(2 * COPY_BYTES / seconds["copy"], operations / seconds["int8"], operations / seconds["bf16"])


def quantization_cases(tokens: int, width: int, device: torch.device) -> list[Case]:
    """The passes over activations, each beside the same work in eager torch."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens // 2, width, device=device, dtype=torch.bfloat16)
    shift, factor = (torch.randn(2, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    hadamard = InputStages(torch.rand(width, device=device) + 0.5, None, None, BLOCK, None)
    order = torch.randperm(width, device=device).to(torch.int32)
    rotation = torch.linalg.qr(torch.randn(64, 64, device=device)).Q.contiguous()
    rotations = InputStages(hadamard.inverse_scale, rotation, order, 0, rotation)
    moved = float(tokens * width * (x.element_size() + 1) + 12 * tokens)

    def modulated() -> torch.Tensor:
        return functional.layer_norm(x, (width,), eps=1e-6) * (1 + factor[:, None]) + shift[:, None]

    def eager(value: torch.Tensor) -> object:
        return dispatch.quantize_activation(value, hadamard, 8, False, backend="torch")

    return [
        Case("quantize", lambda: triton_gpu.quantize_activation(x, NO_STAGES, 8, False), moved),
        Case("scale, H128, quantize", lambda: triton_gpu.quantize_activation(x, hadamard, 8, False), moved),
        Case(
            "scale, R64, gather, R64, quantize", lambda: triton_gpu.quantize_activation(x, rotations, 8, False), moved
        ),
        Case("GELU, scale, H128, quantize", lambda: triton_gpu.gelu_quantize(x, hadamard, 8, False), moved),
        Case(
            "adaLN, scale, H128, quantize",
            lambda: triton_gpu.layer_norm_quantize(x, shift, factor, hadamard, 8, False),
            moved,
        ),
        Case("torch: scale, H128, quantize", lambda: eager(x), moved),
        Case("torch: GELU, scale, H128, quantize", lambda: eager(functional.gelu(x, approximate="tanh")), moved),
        Case("torch: adaLN, scale, H128, quantize", lambda: eager(modulated()), moved),
    ]


def product_cases(tokens: int, width: int, outputs: int, device: torch.device) -> list[Case]:
    """The products alone, beside `_int_mm`, `_scaled_mm` and a bf16 linear."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    w, bias = torch.randn(outputs, width, device=device), torch.randn(outputs, device=device)
    levels = triton_gpu.quantize_activation(x, NO_STAGES, 8, True)
    int8, int4 = _packed(w, 8), _packed(w, 4)
    x8, x_scale = triton_gpu.quantize_fp8(x)
    w8, w_scale = triton_gpu.quantize_fp8(w)
    half, half_bias, kind = w.to(x.dtype), bias.to(x.dtype), x.dtype
    operations, written = 2.0 * tokens * width * outputs, 2.0 * tokens * outputs
    read = float(tokens * width)

    def scaled() -> torch.Tensor:
        scales = (x_scale[:, None], w_scale[None])
        return torch._scaled_mm(x8, w8.t(), *scales, bias=half_bias, out_dtype=kind)

    whole = float(width * outputs)
    once, again = read + whole + written, read + whole + 2 * written

    def through_torch() -> torch.Tensor:
        return dispatch.linear(levels, int8, bias, backend="torch", dtype=kind)

    return [
        Case("bf16 linear", lambda: functional.linear(x, half, half_bias), once + read + whole, operations, "bf16"),
        Case("_int_mm alone (int32 out)", lambda: torch._int_mm(levels.values, int8.data.t()), again, operations),
        Case("int8 product", lambda: triton_gpu.linear(levels, int8, bias, kind), once, operations),
        Case("int8 through torch", through_torch, once, operations),
        Case("packed int4 product", lambda: triton_gpu.linear(levels, int4, bias, kind), once - whole / 2, operations),
        Case("fp8 product", lambda: triton_gpu.fp8_linear(x8, x_scale, w8, w_scale, bias, kind), once, operations),
        Case("_scaled_mm fp8", scaled, once, operations),
    ]


def measure(cases: Sequence[Case], peaks: Peaks, rounds: int) -> list[Timing]:
    """One timing a case, failures among them."""
    calls: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for case in cases:
        try:
            calls[case.name] = recorded(case.call)
        except (RuntimeError, TRDQError) as error:
            failures[case.name] = (str(error).splitlines() or [type(error).__name__])[0][:160]
            torch.cuda.synchronize()
    times = time_calls(calls, rounds)
    return [
        Timing(case.name, failure=failures[case.name])
        if case.name in failures
        else summary(case, times[case.name], peaks)
        for case in cases
    ]


def summary(case: Case, microseconds: Sequence[float], peaks: Peaks) -> Timing:
    """Median, spread, and what share of the median the bound of the case would take."""
    ordered = sorted(microseconds)
    last, median = len(ordered) - 1, statistics.median(ordered)
    rate = peaks.bf16 if case.unit == "bf16" else peaks.int8
    bound = 1e6 * max(case.bytes / peaks.copy, case.operations / rate)
    return Timing(
        case.name, median, ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered), bound / median
    )


def rows_of(title: str, timings: Sequence[Timing], note: str = "") -> list[dict[str, object]]:
    """Rows of results.csv; a call that failed has one with an empty value and its reason."""
    found = machine()
    common = {
        "date": datetime.date.today().isoformat(),
        "device": found["gpu"],
        "threads": found["threads"],
        "model": title,
    }
    rows: list[dict[str, object]] = []
    for timing in timings:
        head = {**common, "recipe": timing.name, "n": timing.rounds or ""}
        if timing.failure:
            empty = {"value": "", "low": "", "high": ""}
            rows.append({**head, "metric": "call_us", **empty, "note": f"failed: {timing.failure}"})
            continue
        spread = {"value": round(timing.median, 2), "low": round(timing.p10, 2), "high": round(timing.p90, 2)}
        rows.append({**head, "metric": "call_us", **spread, "note": note})
        share = {"value": round(timing.bound_share, 4), "low": "", "high": ""}
        rows.append({**head, "metric": "bound_share", **share, "note": note})
    return rows


def print_timings(title: str, timings: Sequence[Timing]) -> None:
    """A table for people."""
    print(f"\n{title}\n{'call':38}{'median us':>11}{'p10':>10}{'p90':>10}{'n':>5}{'of bound':>10}")
    for timing in timings:
        numbers = (
            f"{timing.median:>11.1f}{timing.p10:>10.1f}{timing.p90:>10.1f}{timing.rounds:>5}{timing.bound_share:>10.2f}"
        )
        print(f"{timing.name:38}{timing.failure or numbers}")


def _packed(weight: torch.Tensor, bits: int) -> PackedWeight:
    """A weight of 8 bits by rows, or of 4 bits in groups with two-level scales, in the layout of the GPU kernels."""
    if bits == 8:
        scale = weight.abs().amax(1) / 127
        q, group_scale = (weight / scale[:, None]).round(), None
    else:
        groups = weight.unflatten(1, (-1, GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]))
        wanted = groups.abs().amax(2) / 7
        scale = wanted.amax(1) / 16
        factors = (wanted / scale[:, None]).round().clamp(1, 16)
        q = (groups / (factors * scale[:, None])[:, :, None]).round().clamp(-7, 7).flatten(1)
        group_scale = factors.to(torch.int8)
    return dispatch.pack_weight(q.to(torch.int8), scale, None, group_scale, bits, backend="triton")


def measure_operators(device: torch.device, shapes: Sequence[str], rounds: int) -> list[dict[str, object]]:
    """Print and return the operators' rows."""
    peaks = measure_peaks(device, rounds)
    note = (
        f"copy {peaks.copy / 1e12:.2f} TB/s, int8 {peaks.int8 / 1e12:.0f} TOP/s, bf16 {peaks.bf16 / 1e12:.0f} TFLOP/s"
    )
    print(f"{machine()['gpu']}, torch {torch.__version__}; measured peaks: {note}")
    rows = []
    for shape in shapes:
        tokens, width, outputs = (int(part) for part in shape.split("x"))
        cases = [*quantization_cases(tokens, width, device), *product_cases(tokens, width, outputs, device)]
        with torch.no_grad():
            timings = measure(cases, peaks, rounds)
        print_timings(shape, timings)
        rows += rows_of(f"kernels {shape}", timings, note)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 with one sentence where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=("operators", "step"))
    parser.add_argument("--add", action="store_true", help="take the figures into benchmarks/results.csv")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that --add writes to")
    options = parser.parse_args(arguments)
    try:
        device = require_gpu()
    except BackendUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    rows = [] if options.only == "step" else measure_operators(device, options.shapes, options.rounds)
    if options.only != "operators":
        from benchmarks.gpu_step import measure_step

        rows += measure_step(device, options.rounds)
    if options.add:
        add_rows(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
