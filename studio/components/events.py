"""How the page calls its handlers: short ones in one request, long ones through the queue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import gradio as gr

P = ParamSpec("P")

# Answered in the request itself: no place in a line, and no stream that the end of another event could close.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

# The same where the last of several quick changes is the one that counts.
LATEST: dict[str, Any] = QUICK | {"trigger_mode": "always_last"}

# Handlers that answer several times, or that set a gr.State others follow: an unqueued answer does not wake those.
QUEUED: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

# One line for all jobs: the page may start many, the one worker runs them in turn.
JOBS: dict[str, Any] = QUEUED | {"concurrency_id": "jobs", "concurrency_limit": 16}


def said_once(handler: Callable[P, Iterator[Any]]) -> Callable[P, Iterator[Any]]:
    """A handler that answers several times, with an empty answer at its end.

    Gradio sends the last answer again when a generator ends. That would draw every chart twice, and put back what a person
    chose in between.
    """

    @functools.wraps(handler)
    def handle(*args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        yield from handler(*args, **kwargs)
        yield gr.skip()

    return handle
