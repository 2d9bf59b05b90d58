"""Saving a column of the shown comparison as a model for diffusers: a job like any other, then a download if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components import html
from studio.components.command import shown
from studio.components.events import JOBS, QUEUED, QUICK
from studio.components.saving import PACK, SaveModel
from studio.components.titles import title_of
from studio.context import Studio
from studio.jobs import Job, explain
from studio.pages.shared import fail_if_failed, follow, refuse, session_of, strip_of
from studio.services import export
from studio.services.stored import StoredRun
from studio.state import SAVE_STAGES, LiveRun, Progress

Updates = dict[Any, Any]
HIDDEN: dict[str, Any] = {"visible": False}


def wire(
    studio: Studio, part: SaveModel, run_id: gr.State, strip: gr.HTML, problem: gr.HTML, header: gr.HTML,
    header_now: Callable[[], str],
) -> None:  # fmt: skip
    """Connect the widgets to the run that Compare shows."""
    handlers = _Handlers(studio, part, strip, problem)
    run_id.change(handlers.offer, run_id, part.widgets(), **QUICK)
    part.recipe.input(handlers.choose, [run_id, part.recipe], part.widgets(), **QUICK)
    job = part.start.click(handlers.save, [run_id, part.recipe], [strip, problem, *part.widgets()], **JOBS)
    job.then(header_now, None, header, **QUICK)
    part.pack.click(handlers.pack, part.made, [part.said, part.pack, part.download], concurrency_limit=1, **QUEUED)


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    part: SaveModel
    strip: gr.HTML
    problem: gr.HTML

    def offer(self, run_id: str | None) -> Updates:
        """The columns of a run that was just shown; nothing of it where there is no model to save."""
        run = self.studio.runs.open(run_id)
        names = export.export_names(run)
        if run is None or not names:
            return {self.part.box: gr.Column(**HIDDEN), self.part.made: None}
        choices = [(title_of(name, run.recipes[name]), name) for name in names]
        part = self.part
        return {
            part.box: gr.Column(visible=True), part.recipe: gr.Dropdown(choices=choices, value=names[-1]),
        } | self._about(run, names[-1])  # fmt: skip

    def choose(self, run_id: str | None, recipe: Any) -> Updates:
        """What is known of another column."""
        run = self.studio.runs.open(run_id)
        if run is None or recipe not in export.export_names(run):
            return {self.part.command: gr.skip()}
        return self._about(run, str(recipe))

    def save(self, request: gr.Request, run_id: str | None, recipe: Any) -> Iterator[Updates]:
        """Convert and save, showing how far it is."""
        part = self.part
        try:
            model, work = export.save_work(self.studio.core, self.studio.runs.open(run_id), str(recipe))
            job = self.studio.worker.submit(session_of(request), f"saving of {model}", work)
        except Exception as error:
            yield from refuse(error, self.problem)
            return
        live = LiveRun(Progress(f"Saving {recipe} as a model", stages=SAVE_STAGES))
        yield {
            self.problem: "",
            part.said: "",
            part.pack: gr.Button(**HIDDEN),
            part.download: gr.DownloadButton(**HIDDEN),
        }
        for _ in follow(self.studio, job, live):
            yield {self.strip: strip_of(self.studio, live.progress, job)}
        yield {self.strip: html.ended(live.progress, job, "It is kept under Runs.")} | self._made(job, live)
        fail_if_failed(job)

    def pack(self, made: str | None) -> Iterator[Updates]:
        """Write the zip, then offer it."""
        part = self.part
        yield {part.pack: gr.Button("Packing…", interactive=False), part.download: gr.DownloadButton(**HIDDEN)}
        try:
            archive = export.export_archive(self.studio.runs.open(made), local=self.studio.settings.local)
        except Exception as error:
            yield {part.said: html.notice(explain(error)), part.pack: gr.Button(PACK, interactive=True)}
            return
        yield {
            part.pack: gr.Button(PACK, interactive=True, visible=False),
            part.download: gr.DownloadButton(value=str(archive), visible=True),
        }

    def _made(self, job: Job, live: LiveRun) -> Updates:
        """What a save run that ended left; of one that did not finish nothing is offered."""
        saved = self.studio.runs.open(live.run_id)
        return self._result(saved) if job.state == "done" and saved is not None else {}

    def _about(self, run: StoredRun, recipe: str) -> Updates:
        """The command of a column, and the model if it was saved before."""
        saved = export.saved_before(self.studio.runs, run, recipe)
        command = export.command_of(run, recipe, self.studio.recipes.files())
        return {self.part.command: shown(command)} | self._result(saved)

    def _result(self, saved: StoredRun | None) -> Updates:
        part, found = self.part, export.saved_folder(saved) is not None
        words = export.export_words(saved.report, local=self.studio.settings.local) if saved is not None else ""
        return {
            part.said: html.notice(words, "done"),
            part.made: saved.id if saved is not None and found else None,
            part.pack: gr.Button(PACK, visible=found, interactive=True),
            part.download: gr.DownloadButton(value=None, **HIDDEN),
        }
