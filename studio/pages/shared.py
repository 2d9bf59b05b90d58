"""What the handlers of several pages do alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from studio.components import html
from studio.context import Studio
from studio.jobs import Job, explain
from studio.services.form import RunSpec
from studio.services.work import run_work
from studio.state import LiveRun, Progress

# Runs in the browser before the handler; hands the values on unchanged.
CLOSE_SIDEBAR = """
(...values) => {
  const sidebar = document.querySelector('.sidebar');
  if (window.innerWidth < 768 && sidebar && sidebar.classList.contains('open')) {
    sidebar.querySelector('.toggle-button').click();
  }
  return values;
}
"""


def session_of(request: gr.Request | None) -> str:
    """The visitor's session; one name for calls from outside a page."""
    return str(getattr(request, "session_hash", None) or "local")


def refuse(error: BaseException, problem: gr.HTML) -> Iterator[dict[Any, Any]]:
    """Show one sentence in place and as a toast."""
    text = explain(error)
    yield {problem: html.notice(text)}
    raise gr.Error(text, print_exception=False)


def fail_if_failed(job: Job) -> None:
    """A toast with the sentence of a job that failed."""
    if job.state == "failed":
        raise gr.Error(job.text, print_exception=False)


def submit(studio: Studio, spec: RunSpec, what: str, request: gr.Request | None) -> Job:
    """The run of `spec` at the end of the line; TRDQError if it cannot be taken."""
    return studio.worker.submit(session_of(request), f"{what} of {spec.model}", run_work(studio.core, spec))


def strip_of(studio: Studio, progress: Progress, job: Job) -> str:
    """The progress strip of a job that waits or runs."""
    place = studio.worker.place(job)
    if place:
        return html.waiting(progress.title, place, studio.worker.running_label())
    return html.progress(progress, job)


def follow(studio: Studio, job: Job, live: LiveRun) -> Iterator[set[str]]:
    """The recipes that changed, at once and each time something happened, until the job is over; `live` takes it in."""
    yield set()
    for events in studio.worker.follow(job):
        changed = live.take(events)
        if not job.finished:
            yield changed


def cancel_own(studio: Studio, request: gr.Request | None) -> None:
    """Ask this visitor's job to stop."""
    if not studio.worker.cancel(session_of(request)):
        gr.Info("Nothing of yours is running.")
