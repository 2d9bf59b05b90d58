"""Fetching a model from the sidebar: a job like any other, with its progress in the strip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components import html
from studio.components.command import shown
from studio.components.controls import Controls
from studio.components.events import JOBS, QUICK
from studio.components.getting import GetModel
from studio.context import Studio
from studio.jobs import explain
from studio.pages.shared import CLOSE_SIDEBAR, fail_if_failed, follow, refuse, session_of, strip_of
from studio.services import getting, models
from studio.state import DOWNLOAD_STAGES, LiveRun, Progress

Updates = dict[Any, Any]


def wire(studio: Studio, controls: Controls, strip: gr.HTML, problem: gr.HTML) -> None:
    """Connect the widgets; nothing where the studio does not fetch models."""
    part = controls.getting
    if part is None:
        return
    handlers = _Handlers(studio, controls, part, strip, problem)
    gr.on([part.name.change, part.typed.change], described, [part.name, part.typed], [part.line, part.command], **QUICK)
    part.download.click(
        handlers.download, [part.name, part.typed], [strip, problem, controls.model, part.name, part.typed],
        js=CLOSE_SIDEBAR, **JOBS,
    )  # fmt: skip


def described(name: Any, typed: Any) -> tuple[str, gr.Code]:
    """What would be fetched, and the command that does it."""
    return ("" if str(typed or "").strip() else getting.line(name)), shown(getting.command(name, typed))


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    controls: Controls
    part: GetModel
    strip: gr.HTML
    problem: gr.HTML

    def download(self, request: gr.Request, name: Any, typed: Any) -> Iterator[Updates]:
        """Fetch the model and put it into the list."""
        try:
            wished = getting.asked(name, typed, self.studio.settings.allow_hub)
            work = getting.download_work(self.studio.core, wished)
            job = self.studio.worker.submit(session_of(request), f"download of {wished}", work)
        except Exception as error:
            yield from refuse(error, self.problem)
            return
        live = LiveRun(Progress(f"Fetching {wished}", stages=DOWNLOAD_STAGES))
        yield {self.problem: ""}
        for _ in follow(self.studio, job, live):
            yield {self.strip: strip_of(self.studio, live.progress, job)}
        ended = {self.strip: html.ended(live.progress, job, "It can be chosen as a model now.")}
        yield ended | (self._listed(str(job.result)) if job.state == "done" else {})
        fail_if_failed(job)

    def _listed(self, name: str) -> Updates:
        try:
            left = getting.choices(self.studio.core)
            return {
                self.controls.model: gr.Dropdown(choices=models.choices(self.studio.core), value=name),
                self.part.name: gr.Dropdown(choices=left, value=left[0][1] if left else None),
                self.part.typed: "",
            }
        except Exception as error:
            return {self.problem: html.notice(explain(error))}
