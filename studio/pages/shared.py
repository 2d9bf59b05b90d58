"""What the handlers of several pages do alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from studio.components import html
from studio.jobs import Job, explain


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
