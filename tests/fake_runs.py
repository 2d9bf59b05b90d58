"""`trdq_core.runs` without a model, and a plan and a report as it would give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trdq_core.plan import LayerPlan, Plan
from trdq_core.specs import Recipe, RunSpec

LAYER = LayerPlan(
    layer="blocks.0.attn1.to_q", role="self_q", in_features=256, out_features=256, action="quantize", reason="",
    weight_bits=4, activation_bits=8, transforms="scale, R128", sets=4, kernel="int4 packed", simulated=False,
    fp_bytes=262144, weight_bytes=40000,
)  # fmt: skip
KEPT = LAYER._replace(layer="proj_out", role="final", action="keep", reason="final projection", kernel="float")
PLAN = Plan((LAYER, KEPT), 524288, 40000, 40000, 160000, 4.88, ("all sets stay on disk",))
REPORT: dict[str, Any] = {
    "command": "compare", "model": "pocket-image", "reference": {"label": "FP32"},
    "machine": {"cpu": "some CPU", "threads": 2, "gpu": None}, "prompts": ["owl", "crab"],
    "calibration": {"fingerprint": "0123456789abcdef", "prompts": 16, "steps": 20, "seconds": 12.0, "reused": True},
    "recipes": {
        "fp": {"kind": "reference", "step_ms": {"median": 30.0, "p10": 29, "p90": 31, "n": 9}, "kernels": {"float32": 80}},
        "fp-again": {"kind": "noise_floor", "identical": True, "psnr": None, "ssim": 1.0},
        "tr-dq-w4a8": {"kind": "quantized", "psnr": 31.25, "ssim": 0.9312, "mean_latent_sqnr_db": 20.5,
                       "weight_bytes": 1500, "fp_weight_bytes": 10000, "kernels": {"int4 packed": 80}, "rejected": [{}]},
        "rtn-w4a4": {"kind": "quantized", "psnr": 11.0, "ssim": 0.3, "step_ms": None, "simulated": True, "kernels": {}},
    },
}  # fmt: skip


class FakeRuns(SimpleNamespace):
    """`trdq_core.runs` without a model; `error` is raised by run, `specs` are what it was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(specs=[], error=None, folder=folder)

    def models(self) -> list[Any]:
        """One model."""
        return [Info("pocket-image", Path("assets/pocket-image"), "image", "small", True, "")]

    def new_run_folder(self, command: str) -> Path:
        """A folder under the test's own."""
        return self.folder / command

    def plan(self, model: str, recipe: Recipe, **options: Any) -> Plan:
        """The plan of two layers."""
        return PLAN

    def preflight(self, model: str, *, loading: object = None) -> None:
        """A model of random weights, which is not looked at."""

    def run(self, spec: RunSpec, folder: Path, *, on_event: Callable[..., None], cancelled: Callable[[], bool]) -> Any:
        """Tell one stage and hand out the report, or raise."""
        self.specs.append(spec)
        on_event({"kind": "stage", "stage": "load", "label": "Loading", "recipe": None})
        on_event({"kind": "warning", "text": "something to know"})
        if self.error is not None:
            raise self.error
        return REPORT


class Info(SimpleNamespace):
    """Stands for ModelInfo."""

    def __init__(self, *values: Any) -> None:
        super().__init__(
            **dict(zip(("name", "path", "kind", "description", "available", "reason"), values, strict=True)),
            source="repository",
            repo=None,
            revision=None,
        )

    def _asdict(self) -> dict[str, Any]:
        return dict(vars(self))
