"""How the page calls its handlers: short ones in one request, long ones through the queue."""

from __future__ import annotations

from typing import Any

# Answered in the request itself: no place in a line, and no stream that the end of another event could close.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

# The same where the last of several quick changes is the one that counts.
LATEST: dict[str, Any] = QUICK | {"trigger_mode": "always_last"}

# Gradio repeats the last answer of a generator as it ends. An empty one after it does not help: the page applies each answer
# to the former in place, so on a busy machine the one before the last is drawn empty.
# Handlers that answer several times, or that set a gr.State others follow: an unqueued answer does not wake those.
QUEUED: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

# One line for all jobs: the page may start many, the one worker runs them in turn.
JOBS: dict[str, Any] = QUEUED | {"concurrency_id": "jobs", "concurrency_limit": 16}
