"""Runs: what the command line and the studio start. A run reads a specification and writes a folder that holds the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trdq_core.errors import Cancelled, TRDQError
from trdq_core.events import Event, OnEvent, ignore
from trdq_core.folders import (
    CalibrationInfo,
    RunFolder,
    RunInfo,
    data_folder,
    list_calibrations,
    list_runs,
    new_run_folder,
    read_calibration,
)
from trdq_core.models import (
    ModelInfo,
    find_folder,
    layers_of_model,
    listed_name,
    memory_of,
    models,
    notes_of_model,
)
from trdq_core.specs import DEFAULT_LOADING, Loading, Recipe, RunSpec, fused_name

if TYPE_CHECKING:
    from trdq_core.hub.store import Downloaded
    from trdq_core.memory import Device, Preflight
    from trdq_core.plan import Plan

__all__ = [
    "CalibrationInfo", "Event", "ModelInfo", "OnEvent", "RunInfo", "data_folder", "download", "find_calibration",
    "list_calibrations", "list_runs", "models", "new_run_folder", "plan", "preflight", "run",
]  # fmt: skip


def plan(model: str, recipe: Recipe, *, backend: str | None = None, steps: int = 20) -> Plan:
    """The plan table of a recipe on a model, before anything runs."""
    find_folder(model)  # an unknown name is refused before seconds go into importing torch
    import torch

    from trdq_core.kernels import dispatch
    from trdq_core.plan import make_plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = dispatch.select_backend(device, backend)
    made = make_plan(layers_of_model(model), recipe, steps=steps, backend=chosen)
    return made._replace(notes=(*made.notes, *notes_of_model(model))) if recipe.quantized else made


def preflight(model: str, device: Device | None = None, *, loading: Loading = DEFAULT_LOADING) -> Preflight | None:
    """What a model needs in memory and what there is, from file headers; None for the one with random weights."""
    return memory_of(model, device, loading)


def download(
    name: str,
    *,
    on_event: OnEvent | None = None,
    cancelled: Callable[[], bool] | None = None,
    anonymous: bool = False,
) -> Downloaded:
    """Fetch a model of the hub by its name in the list of models, or by its id; it can then be picked as any other.

    `anonymous` leaves this machine's token out. Raises TRDQError with one plain sentence; Cancelled keeps whole files.
    """
    from trdq_core.hub.download import download as fetch

    return fetch(name, on_event=on_event or ignore, cancelled=cancelled, anonymous=anonymous)


def find_calibration(spec: RunSpec) -> CalibrationInfo | None:
    """The stored statistics that `spec` would reuse: same model, prompts, steps, guidance and seed. None if there are none.

    The run itself compares fingerprints, weights included; this look-up only reads descriptions.
    """
    model = fused_name(listed_name(spec.model), spec.lora)  # a folder's calibrations go by its last part
    for info in list_calibrations(model):
        about = json.loads((info.folder / "statistics.json").read_text())
        same = (info.steps, info.guidance, info.seed) == (spec.steps, spec.guidance, spec.seed)
        if same and tuple(about["prompts"]) == spec.calibration_prompts:
            return read_calibration(info.folder)
    return None


def run(
    spec: RunSpec,
    folder: Path,
    *,
    on_event: OnEvent | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Do what `spec` says and return the report, which is also `folder`/report.json.

    Raises TRDQError with one plain sentence; Cancelled after what was finished is written.
    """
    from trdq_core.execution import execute

    target = RunFolder(folder, spec, on_event or ignore)
    try:
        report = execute(spec, target, cancelled or (lambda: False))
    except Cancelled as error:
        target.emit({"kind": "cancelled", "text": str(error)})
        raise
    except TRDQError as error:
        target.emit({"kind": "failed", "text": str(error)})
        raise
    except MemoryError as error:
        text = (
            f"{spec.command}: the machine ran out of memory; use fewer prompts, fewer time groups or a smaller model."
        )
        target.emit({"kind": "failed", "text": text})
        raise TRDQError(text) from error
    target.emit({"kind": "done", "text": f"{spec.command} finished"})
    return report
