"""What all commands begin and end with: the loaded model, the header of the report, the report on disk."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trdq_core import profiling
from trdq_core.evaluation.command import evaluate
from trdq_core.execution.commands import attention, calibrate, sample_prompts
from trdq_core.execution.compare import compare
from trdq_core.execution.save import save
from trdq_core.execution.timing import profile
from trdq_core.folders import RunFolder
from trdq_core.kernels import dispatch
from trdq_core.models import load_model
from trdq_core.outputs import clip_facts
from trdq_core.saving import add_lora
from trdq_core.sensitivity.command import sensitivity
from trdq_core.session import Session, check_plan
from trdq_core.specs import RunSpec, fused_name

REPORT_VERSION = 1
COMMANDS = {
    "calibrate": calibrate, "sample": sample_prompts, "compare": compare, "profile": profile, "attention": attention,
    "evaluate": evaluate, "sensitivity": sensitivity, "save": save,
}  # fmt: skip

LABELS = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


def execute(spec: RunSpec, folder: RunFolder, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Do what `spec` says; the report is written as soon as there is something to report, and after each recipe."""
    folder.emit({"kind": "stage", "stage": "load", "label": f"Loading {spec.model}", "recipe": None})
    model = load_model(spec.model, anyway=spec.anyway, size=spec.size, loading=spec.loading)
    if spec.lora is not None:
        folder.emit({"kind": "stage", "stage": "load", "label": f"Adding {Path(spec.lora).name}", "recipe": None})
        add_lora(model, spec.lora, spec.lora_scale)
    session = Session(spec, folder, cancelled, model, dispatch.select_backend(model.device, spec.backend))
    report = _header(session)
    try:
        if spec.command != "evaluate":  # which makes a row of what cannot be done, and goes on
            for recipe in spec.recipes:
                check_plan(session, recipe)
        COMMANDS[spec.command](session, report)
    finally:
        report["clip"] = clip_facts(session.outputs.clip)  # some models' size shows only in what was decoded
        folder.write_report(report)
    return report


def _header(session: Session) -> dict[str, Any]:
    model, spec = session.model, session.spec
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "format_version": REPORT_VERSION,
        "command": spec.command,
        "model": fused_name(spec.model, spec.lora),
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "reference": {
            "label": LABELS.get(dtype, dtype),
            "dtype": dtype,
            "device": model.device.type,
        },
        "machine": profiling.machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")},
        },
        "spec": spec.to_dict(),
        "kernel_backend": dispatch.describe(model.device),
        "clip": clip_facts(model.clip),
        "calibration": None,
        "prompts": list(spec.prompts),
        "recipes": {},
    }
