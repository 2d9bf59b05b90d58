"""The work that the one worker does: a run of the core in a fresh folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.jobs import Event, Work
from studio.services import models
from studio.services.core import Core
from trdq_core.specs import RunSpec


def run_work(core: Core, spec: RunSpec) -> Work:
    """Work that runs `spec`; its first event names the folder, its result is the folder. ModelError for an unlisted model."""

    models.check(core, spec.model)

    def work(on_event: Callable[[Event], None], cancelled: Callable[[], bool]) -> Path:
        folder = Path(core.runs.new_run_folder(spec.command))
        on_event({"kind": "folder", "folder": str(folder)})
        core.runs.run(spec, folder, on_event=on_event, cancelled=cancelled)
        return folder

    return work


def call_work(function: Callable[[], Any]) -> Work:
    """Work that only calls `function`: it waits its turn, so that it does not disturb what is being measured."""

    def work(on_event: Callable[[Event], None], cancelled: Callable[[], bool]) -> Any:
        return function()

    return work
