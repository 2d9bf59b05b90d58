"""The work that the one worker does: a run of the core in a fresh folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.jobs import Event, Job, Work, Worker
from studio.services import gpu, models
from studio.services.core import Core
from studio.services.form import Form, run_spec
from trdq_core.errors import TRDQError
from trdq_core.specs import RunSpec

log = logging.getLogger(__name__)


def run_work(core: Core, spec: RunSpec) -> Work:
    """Work that runs `spec`; its first event names the folder, its result is the folder. ModelError for an unlisted model."""

    models.check(core, spec.model)

    def work(on_event: Callable[[Event], None], cancelled: Callable[[], bool]) -> Path:
        folder = Path(core.runs.new_run_folder(spec.command))
        on_event({"kind": "folder", "folder": str(folder)})
        if gpu.lent():
            gpu.run(spec, folder, on_event, cancelled)
        else:
            core.runs.run(spec, folder, on_event=on_event, cancelled=cancelled)
        return folder

    return work


def call_work(function: Callable[[], Any]) -> Work:
    """Work that only calls `function`: it waits its turn, so that it does not disturb what is being measured."""

    def work(on_event: Callable[[Event], None], cancelled: Callable[[], bool]) -> Any:
        return function()

    return work


def prepare(core: Core, worker: Worker) -> Job | None:
    """Calibrate the pocket model as the page opens with, so that the first visitor need not wait; None where that is done.

    Its statistics are a quarter of a gigabyte, too much to ship. On a GPU that is lent by the call this goes on the Space's
    own account; where that is used up, the log says so and the first visitor's run calibrates.
    """
    spec = run_spec(Form(), "calibrate", (), ())
    known = {info.name for info in core.runs.models() if info.available}
    if spec.model not in known or core.runs.find_calibration(spec) is not None:
        return None
    calibrate = run_work(core, spec)

    def work(on_event: Callable[[Event], None], cancelled: Callable[[], bool]) -> Path:
        try:
            return calibrate(on_event, cancelled)
        except TRDQError as error:
            log.warning("The first calibration of %s was not done: %s", spec.model, error)
            raise

    return worker.submit("preparation", f"first calibration of {spec.model}", work)
