"""One denoiser step cut into linears, attention, rotation and quantization, norms and modulation, activations, and the rest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trdq_core.errors import StorageError
from trdq_core.kernels.observing import observed, timed_phases

CATEGORIES = ("linears", "attention", "rotation_quantization", "norms_modulation", "activations", "rest")

# Operators of torch by category, the first match wins. Elementwise sums and products in a transformer block are
# modulation, gates and residuals.
_OPERATORS: tuple[tuple[str, str], ...] = (
    (r"attention|softmax|^aten::bmm$|^trdq::attend", "attention"),
    (r"addmm|::mm$|_int_mm|::linear$|mkldnn_linear|qlinear|^trdq::linear|scaled_mm$", "linears"),
    (r"trdq::(quantize|transform)|round|clamp|amax|amin|index_select|nan_to_num|bitwise", "rotation_quantization"),
    (r"gelu|silu|sigmoid", "activations"),
    (r"layer_norm|::(add|mul|addcmul|rsub)_?$", "norms_modulation"),
)
# Phases inside the C++ kernels. What comes before the transform is a norm in one linear and GELU in another.
_PHASES = {"transform": "rotation_quantization", "quantize": "rotation_quantization", "multiply": "linears",
           "attend": "attention"}  # fmt: skip
STEPS = 5


def category_of(operator: str) -> str:
    """The category of a torch operator by its name; "rest" for what moves or makes tensors."""
    return next((category for pattern, category in _OPERATORS if re.search(pattern, operator)), "rest")


@torch.no_grad()
def split_step(step: Callable[[], Any], steps: int = STEPS) -> dict[str, Any]:
    """Milliseconds of one call of `step` by category, means of `steps` calls, under a profiler that slows it down.

    "total_ms" is the profiled step, "plain_ms" the same call just before, unprofiled: what lies between is the measuring.
    "rest" is what is left of the total: copies, embeddings, Python, the profiler itself. Operators count for themselves
    alone, without those that they call. On CUDA the times are those of the device.
    """
    step()
    plain = _mean_ms(step, steps)
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    before: dict[str, float] = {"gelu": 0.0, "norm": 0.0}
    with timed_phases() as phases:
        running = _Running(phases)
        with observed(running.see), profile(activities=activities) as profiler:
            total = _mean_ms(step, steps)
        inside = phases()
        before = running.split_before(inside.get("before", 0.0))
    split = dict.fromkeys(CATEGORIES, 0.0)
    for event in profiler.key_averages():
        taken = event.self_device_time_total if cuda else event.self_cpu_time_total
        if not event.key.startswith(("trdq: ", "ProfilerStep")):
            split[category_of(event.key)] += taken / 1000 / steps
    for phase, category in _PHASES.items():
        split[category] += inside.get(phase, 0.0) / steps
    split["activations"] += before["gelu"] / steps
    split["norms_modulation"] += before["norm"] / steps
    named = sum(split[name] for name in CATEGORIES if name != "rest")
    split["rest"] = max(0.0, total - named)
    return {
        "parts_ms": {name: round(value, 4) for name, value in split.items()},
        "total_ms": round(total, 4),
        "plain_ms": round(plain, 4),
        "steps": steps,
    }


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


def _mean_ms(step: Callable[[], Any], steps: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize()
    return 1000 * (time.perf_counter() - started) / steps


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
