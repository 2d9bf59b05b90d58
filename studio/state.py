"""What a page knows while a job runs: the core's events folded into a few values."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.jobs import Event, Job
from studio.services.stored import inside

STAGES = ("load", "calibrate", "fit", "reference", "sample", "measure")
ATTENTION_STAGES = ("load", "attention")
DOWNLOAD_STAGES = ("download",)
SAVE_STAGES = ("load", "calibrate", "fit", "reference", "sample", "save")
SCAN_STAGES = ("load", "calibrate", "reference", "fit", "measure")


@dataclass
class Progress:
    """A job's progress as the strip shows it."""

    title: str
    stage: str = ""
    label: str = ""
    recipe: str = ""
    done: int = 0
    total: int = 0
    eta_seconds: float | None = None
    detail: str = ""
    warnings: list[str] = field(default_factory=list)
    stages: tuple[str, ...] = STAGES  # those that this kind of run goes through
    began: float = field(default_factory=time.monotonic)

    def take(self, event: Event) -> None:
        """Fold one event in."""
        kind = event.get("kind")
        if kind == "stage":
            self.stage, self.label = str(event.get("stage") or ""), str(event.get("label") or "")
            self.recipe = str(event.get("recipe") or "")
            self.done, self.total, self.eta_seconds, self.detail = 0, 0, None, ""
        elif kind == "progress":
            self.stage = str(event.get("stage") or self.stage)
            self.recipe = str(event.get("recipe") or "")
            self.done, self.total = int(event.get("done") or 0), int(event.get("total") or 0)
            self.eta_seconds, self.detail = event.get("eta_seconds"), str(event.get("detail") or "")
        elif kind == "warning":
            self.warnings.append(str(event.get("text") or ""))

    def seconds(self, job: Job) -> float:
        """How long the job has run."""
        if job.started is None:
            return 0.0
        return (job.ended or time.monotonic()) - job.started


@dataclass
class LiveRun:
    """A run that is going on: its folder, and what each recipe has so far for the first prompt."""

    progress: Progress
    folder: Path | None = None
    pictures: dict[str, Path] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def take(self, events: list[Event]) -> set[str]:
        """Fold events in; the recipes whose column changed."""
        changed: set[str] = set()
        for event in events:
            self.progress.take(event)
            kind, recipe = event.get("kind"), str(event.get("recipe") or "")
            if kind == "folder":
                self.folder = Path(event["folder"])
            elif kind in ("preview", "image", "clip") and event.get("prompt", 0) == 0 and self.folder:
                path = inside(self.folder, str(event.get("image")))
                if path:
                    self.pictures[recipe] = path
                self.steps[recipe] = f"step {event.get('step')} of {event.get('steps')}" if kind == "preview" else ""
                changed.add(recipe)
            elif kind == "result":
                self.results[recipe] = dict(event.get("metrics") or {})
                changed.add(recipe)
        return changed

    @property
    def run_id(self) -> str | None:
        """The run's id, which is its folder's name."""
        return self.folder.name if self.folder else None
