"""One denoiser step cut into linears, attention, rotation and quantization, norms and modulation, activations, and the rest."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trdq_core.errors import StorageError
from trdq_core.kernels.observing import observed, timed_phases

CATEGORIES = ("linears", "attention", "rotation_quantization", "norms_modulation", "activations", "rest")

# Operators of torch by category, the first match wins. Elementwise sums and products in a transformer block are
# modulation, gates and residuals.
_OPERATORS: tuple[tuple[str, str], ...] = (
    (r"attention|softmax|^aten::bmm$|^trdq::attend", "attention"),
    (r"addmm|::mm$|_int_mm|::linear$|mkldnn_linear|qlinear|^trdq::(triton_(fp8_)?)?linear|scaled_mm$", "linears"),
    (
        r"trdq::(triton_)?(quantize|transform)|round|clamp|amax|amin|index_select|nan_to_num|bitwise",
        "rotation_quantization",
    ),
    (r"gelu|silu|sigmoid", "activations"),
    (r"layer_norm|::(add|mul|addcmul|rsub)_?$", "norms_modulation"),
)
# Phases inside the C++ kernels. What comes before the transform is a norm in one linear and GELU in another.
_CATEGORY_OF_PHASE = {"transform": "rotation_quantization", "quantize": "rotation_quantization", "multiply": "linears",
                      "attend": "attention", "gelu": "activations", "norm": "norms_modulation"}  # fmt: skip
OWN = "trdq::"  # operators of this library: around the phases of a kernel they are Python
STEPS = 5
HOW = (
    "medians over rounds of a plain step, a step with timed kernel phases and a step under torch's profiler; the rest is the "
    "plain step less the parts, so what measuring costs is in none"
)


def category_of(operator: str) -> str:
    """The category of a torch operator by its name; "rest" for what moves or makes tensors."""
    return next((category for pattern, category in _OPERATORS if re.search(pattern, operator)), "rest")


@torch.no_grad()
def split_step(step: Callable[[], Any], steps: int = STEPS) -> dict[str, Any]:
    """Milliseconds of one call of `step` as users run it, by category: medians over `steps` rounds of three calls each.

    The first call is plain, "plain_ms". In the second the C++ kernels time their phases, in the third torch's profiler its
    operators, each for itself alone without those that it calls; operators of this library count by their phases where those
    are known. "rest" is the plain step less the sum of these: copies, embeddings, Python. So what measuring adds between
    operators and kernels is in no category; "total_ms", the step under the profiler, says how much that is. Where the
    categories by themselves already sum to more than the plain step, the rest is 0. On CUDA the times of operators are those
    of the device. "products" are the integer operations of the linears and the milliseconds inside of their products.
    """
    step()
    rounds = [_round(step) for _ in range(steps)]
    parts = {name: statistics.median(one.parts[name] for one in rounds) for name in CATEGORIES[:-1]}
    plain = statistics.median(one.plain for one in rounds)
    parts["rest"] = max(0.0, plain - sum(parts.values()))
    return {
        "parts_ms": {name: round(value, 4) for name, value in parts.items()},
        "total_ms": round(statistics.median(one.profiled for one in rounds), 4),
        "plain_ms": round(plain, 4),
        "steps": steps,
        "products": {
            "integer_operations": rounds[0].product_operations,
            "ms": round(statistics.median(one.product_ms for one in rounds), 4),
        },
        "how": HOW,
    }


class _Round(NamedTuple):
    """Milliseconds of one plain call, of one under the profiler, and what categories took."""

    plain: float
    profiled: float
    parts: dict[str, float]
    product_ms: float
    product_operations: int


def _round(step: Callable[[], Any]) -> _Round:
    plain = _milliseconds(step)
    parts = dict.fromkeys(CATEGORIES, 0.0)
    inside, operations = _phases_of(step)
    for phase, category in _CATEGORY_OF_PHASE.items():
        parts[category] += inside.get(phase, 0.0)
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        profiled = _milliseconds(step)
    for event in profiler.key_averages():
        # On CUDA a kernel is an event of its own too, beside the operator that it already counts for.
        if event.device_type != DeviceType.CPU:
            continue
        taken = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda or not event.key.startswith(OWN):
            parts[category_of(event.key)] += taken / 1000
    return _Round(plain, profiled, parts, inside.get("multiply", 0.0), operations)


def _phases_of(step: Callable[[], Any]) -> tuple[dict[str, float], int]:
    """Milliseconds of the kernels' phases in one call, what comes before the transform told apart; and the integer
    operations of its linears.
    """
    operations = 0
    with timed_phases() as phases:
        running = _Running(phases)

        def see(call: Any) -> None:
            nonlocal operations
            running.see(call)
            operations += 0 if call.work.name.startswith("attention") else call.work.integer_operations

        with observed(see):
            step()
        inside = phases()
        before = running.split_before(inside.get("before", 0.0))
    return inside | before, operations


class _Running:
    """Tells norms from GELU in what the kernels do before the transform: whatever was added belongs to the call before."""

    def __init__(self, phases: Callable[[], dict[str, float]]) -> None:
        self._phases = phases
        self._kind: str | None = None
        self._seen = 0.0
        self._sums = {"gelu": 0.0, "norm": 0.0}

    def see(self, call: Any) -> None:
        self._close()
        self._kind = next((kind for kind in self._sums if call.work.name.startswith(kind)), None)

    def split_before(self, total: float) -> dict[str, float]:
        """Milliseconds of both kinds, of which there are `total`."""
        self._close()
        known = sum(self._sums.values())
        return {kind: value * total / known if known else 0.0 for kind, value in self._sums.items()}

    def _close(self) -> None:
        now = self._phases().get("before", 0.0)
        if self._kind is not None:
            self._sums[self._kind] += now - self._seen
        self._seen = now


@torch.no_grad()
def trace_step(step: Callable[[], Any], file: Path) -> None:
    """Write one call of `step` as a Chrome trace (chrome://tracing, ui.perfetto.dev); StorageError if it cannot be written."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    step()
    with observed(lambda call: None), profile(activities=activities) as profiler:
        step()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{file}: the trace could not be written ({error}); choose another file.") from error
    if not file.exists():
        raise StorageError(f"{file}: the trace could not be written; choose another file.")


def _milliseconds(step: Callable[[], Any]) -> float:
    _synchronize()
    started = time.perf_counter()
    step()
    _synchronize()
    return 1000 * (time.perf_counter() - started)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
