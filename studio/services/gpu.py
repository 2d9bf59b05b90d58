"""Runs on a GPU that a Space lends for seconds (ZeroGPU); anywhere else nothing here changes anything.

There the decorated function works in a forked process: nothing it sets is seen by the page, and no tensor may come back. So a
run leaves its files in its folder, which both see, and hands events out as plain values; Cancel is a file.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from studio.jobs import Event
from trdq_core import runs
from trdq_core.errors import Cancelled, TRDQError
from trdq_core.specs import RunSpec

UNEXPECTED = "The run stopped on the GPU for a reason that was not foreseen; the log has it. What was finished is kept."
STEP_SECONDS = 0.05  # of the pocket models, with room; a larger model wants --model-root and a machine of one's own
START_SECONDS, FIT_SECONDS = 20, 15
LEAST_SECONDS, MOST_SECONDS = 30, 120


def lent() -> bool:
    """Whether this is a Space with a GPU that is lent by the call."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def seconds_for(spec_text: str, folder: str, stop: str) -> int:
    """How long to ask the GPU for: a shorter time waits less in the line. The arguments are those of `run_events`."""
    spec = RunSpec.from_json(spec_text)
    sampled = len(spec.prompts) * (len(spec.recipes) + 2) + len(spec.calibration_prompts)
    asked = START_SECONDS + FIT_SECONDS * len(spec.recipes) + sampled * spec.steps * STEP_SECONDS
    return min(MOST_SECONDS, max(LEAST_SECONDS, math.ceil(asked)))


def on_lent_gpu(function: Callable[..., Iterator[Event]]) -> Callable[..., Iterator[Event]]:
    """`function` on the lent GPU; itself where none is lent or the package that lends it is missing."""
    if not lent():
        return function
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(duration=seconds_for)(function)


def _run_events(spec_text: str, folder: str, stop: str) -> Iterator[Event]:
    """Run a specification and hand out its events; the last one says how it went if it did not go well.

    Plain texts in and plain values out: they cross a process border. A file called `stop` cancels.
    """
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            spec = RunSpec.from_json(spec_text)
            runs.run(spec, Path(folder), on_event=events.put, cancelled=Path(stop).exists)
        except TRDQError as error:
            events.put({"kind": "raised", "cancelled": isinstance(error, Cancelled), "text": str(error)})
        except Exception as error:  # it must reach the page as a sentence, whatever it was
            events.put({"kind": "raised", "cancelled": False, "text": UNEXPECTED, "cause": repr(error)})
        finally:
            events.put(None)

    thread = threading.Thread(target=work, name="run-on-gpu", daemon=True)
    thread.start()
    while (event := events.get()) is not None:
        yield event
    thread.join()


run_events = on_lent_gpu(_run_events)


def run(
    spec: RunSpec, folder: Path, on_event: Callable[[Event], None], cancelled: Callable[[], bool]
) -> None:  # fmt: skip
    """Do what `runs.run` does, on the lent GPU; raises what it raises."""
    stop = folder.with_name(folder.name + ".stop")
    last: dict[str, Any] = {}
    try:
        for event in run_events(spec.to_json(), str(folder), str(stop)):
            last = event
            if event.get("kind") != "raised":
                on_event(event)
            if cancelled() and not stop.exists():
                stop.parent.mkdir(parents=True, exist_ok=True)
                stop.touch()
    finally:
        stop.unlink(missing_ok=True)
    if last.get("kind") == "raised":
        raise (Cancelled if last["cancelled"] else TRDQError)(str(last["text"]))
