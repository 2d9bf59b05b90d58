"""One run at work: its model, folder and way to be cancelled; its statistics and its changed denoisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trdq_core.calibration import calibrate, calibration_fingerprint, store
from trdq_core.convert import Conversion, convert, convert_sharing_only
from trdq_core.errors import CalibrationError, PeerError, StorageError
from trdq_core.events import Progress
from trdq_core.folders import RunFolder, data_folder, list_calibrations
from trdq_core.kernels import dispatch
from trdq_core.model_passes import make_passes
from trdq_core.outputs import OutputWriter
from trdq_core.peers.convert import PeerConversion, Sampling, convert_peer
from trdq_core.plan import make_plan
from trdq_core.sampling import Conditioning, SampledModel, Trajectory, check_branches
from trdq_core.specs import Recipe, RunSpec
from trdq_core.statistics import Statistics


@dataclass
class Session:
    """One run: its model, folder and way to be cancelled; and the references the quantized runs are compared with."""

    spec: RunSpec
    folder: RunFolder
    cancelled: Callable[[], bool]
    model: SampledModel
    backend: dispatch.Backend
    conditionings: list[Conditioning] = field(default_factory=list)
    references: list[Trajectory] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)  # of the reference; clips where the model makes clips

    @cached_property
    def outputs(self) -> OutputWriter:
        """Where pictures and clips go; one for the run, so that it warns of a missing codec once."""
        return OutputWriter(self.folder, self.model.clip)

    def stage(self, stage: str, label: str, recipe: str | None = None) -> None:
        """Tell that a stage begins."""
        self.folder.emit({"kind": "stage", "stage": stage, "label": label, "recipe": recipe})

    def progress(self, stage: str, total: int, recipe: str | None = None) -> Progress:
        """A counter that reports to the run folder and can be cancelled."""
        return Progress(stage, total, on_event=self.folder.emit, cancelled=self.cancelled, recipe=recipe)


def statistics_for(session: Session, report: dict[str, Any]) -> Statistics:
    """The statistics `spec` asks for: the stored ones if their fingerprint is the same, else a new calibration."""
    spec, model = session.spec, session.model
    prompts = spec.calibration_prompts
    settings = {"steps": spec.steps, "guidance": spec.guidance, "seed": spec.seed}
    fingerprint = calibration_fingerprint(model, prompts, **settings)
    stored = data_folder() / "calibrations" / fingerprint
    statistics = None
    if any(info.fingerprint == fingerprint for info in list_calibrations()):
        try:
            statistics = Statistics.load(stored)
        except CalibrationError as error:
            session.folder.emit({"kind": "warning", "text": f"{error} It is made again now."})
    reused = statistics is not None
    if statistics is None:
        session.stage("calibrate", f"Calibrating on {len(prompts)} prompts")
        statistics = calibrate(
            model,
            prompts,
            **settings,
            on_event=session.folder.emit,
            cancelled=session.cancelled,
            partial=data_folder() / "calibrations" / f"{fingerprint}.partial",
        )
        try:
            store(statistics, data_folder() / "calibrations")
        except StorageError as error:
            if spec.command == "calibrate":  # the statistics are all that this command is for
                raise
            session.folder.emit({"kind": "warning", "text": f"{error} This run goes on without storing them."})
    report["calibration"] = {
        "fingerprint": fingerprint,
        "prompts": len(prompts),
        "steps": spec.steps,
        "seconds": statistics.about["seconds"],
        "timesteps": list(statistics.timesteps),
        "reused": reused,
    }
    return statistics


def check_plan(session: Session, recipe: Recipe) -> None:
    """The dry run: RecipeError or ShapeError names the layer that cannot take its rule, before anything is sampled for it.

    Another tool looks at the layers by itself.
    """
    if recipe.fitted:
        make_plan(session.model.linears(), recipe, steps=session.spec.steps, backend=session.backend)


def convert_for(session: Session, recipe: Recipe, statistics: Statistics | None) -> Conversion | PeerConversion:
    """The denoiser changed by `recipe`; one that only shares attention, or names another tool, takes no statistics."""
    if recipe.peer is not None:
        return _hand_to_peer(session, recipe)
    if recipe.sharing is not None:
        check_branches(session.model)
    if not recipe.quantized:
        model = session.model
        return convert_sharing_only(model.denoiser, model.linears(), recipe, argument=model.timestep_argument)
    assert statistics is not None  # the caller made them, since the recipe quantizes
    session.stage("fit", f"Fitting {recipe.name}", recipe.name)
    reports = {"on_event": session.folder.emit, "cancelled": session.cancelled}

    passes = make_passes(
        session.model,
        statistics,
        recipe,
        folder=data_folder() / "reconstructions",
        seed=session.spec.seed,
        announce=lambda stage, label: session.stage(stage, label, recipe.name),
        **reports,
    )
    return convert(
        session.model.denoiser,
        session.model.linears(),
        recipe,
        statistics,
        backend=session.backend,
        storage_folder=data_folder() / "sets",
        argument=session.model.timestep_argument,
        seed=session.spec.seed,
        passes=passes,
        **reports,
    )


def _hand_to_peer(session: Session, recipe: Recipe) -> PeerConversion:
    """The denoiser as another tool converts it, on the calibration prompts if it asks for any."""
    spec = session.spec
    session.stage("fit", f"Handing the model to {recipe.name}", recipe.name)
    return convert_peer(
        session.model,
        recipe,
        Sampling(spec.calibration_prompts or spec.prompts, spec.steps, spec.guidance, spec.seed),
        on_event=session.folder.emit,
        cancelled=session.cancelled,
    )


def failed_row(session: Session, error: PeerError) -> dict[str, Any]:
    """The row of another tool that is not there or did not run: the sentence that says why. The others go on."""
    session.folder.emit({"kind": "warning", "text": f"Left out: {error}"})
    return {"kind": "failed", "error": str(error), "simulated": False}
