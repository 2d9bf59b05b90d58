"""Runs on a GPU that a Space lends for seconds (ZeroGPU); anywhere else nothing here changes anything.

There the decorated function works in a forked process: nothing it sets is seen by the page, and no tensor may come back. So a
run leaves its files in its folder, which both see, and hands events out as plain values; Cancel is a file.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from studio.jobs import Event
from trdq_core import models, runs
from trdq_core.errors import Cancelled, TRDQError
from trdq_core.specs import RunSpec

log = logging.getLogger(__name__)
UNEXPECTED = "The run stopped on the GPU for a reason that was not foreseen; the log has it. What was finished is kept."
ABORTED = (
    "The GPU was taken back before the run was done, as its time was over; what was finished is kept, so start it again, with "
    "fewer prompts or steps."
)
LEFT = "The page was left while it waited for a GPU; start the run again."
STEP_SECONDS = 0.05  # of the smallest models, whose time goes into starting kernels
# Two operations a parameter for 4096 tokens (1024 pixels) of both branches, at 160 TFLOP/s; long clips take longer.
SECONDS_PER_PARAMETER = 1e-10
SECONDS_PER_BYTE = 1e-9  # of reading weights and moving them to the GPU
START_SECONDS, FIT_SECONDS = 20, 15
LEAST_SECONDS, MOST_SECONDS = 30, 120


def lent() -> bool:
    """Whether this is a Space with a GPU that is lent by the call."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def seconds_for(spec_text: str, folder: str, stop: str) -> int:
    """How long to ask the GPU for: a shorter time waits less in the line. The arguments are those of `run_events`."""
    spec = RunSpec.from_json(spec_text)
    parameters, stored = _size_of(spec.model)
    calibrated = 0 if runs.find_calibration(spec) is not None else len(spec.calibration_prompts)
    sampled = len(spec.prompts) * (len(spec.recipes) + 2) + calibrated
    step = STEP_SECONDS + parameters * SECONDS_PER_PARAMETER
    start = START_SECONDS + stored * SECONDS_PER_BYTE
    asked = start + FIT_SECONDS * len(spec.recipes) + sampled * spec.steps * step
    return min(MOST_SECONDS, max(LEAST_SECONDS, math.ceil(asked)))


def _size_of(model: str) -> tuple[int, int]:
    """Parameters of a model's denoiser, and the bytes of all its weights in files."""
    from trdq_core.memory import DENOISER  # brings torch along, and the page must not wait for it

    found = runs.preflight(model, "cpu")
    if found is None:  # it is made of random weights, not read
        return sum(layer.in_features * layer.out_features for layer in models.layers_of_model(model)), 0
    denoiser = sum(part.parameters for part in found.components if part.name == DENOISER)
    return denoiser, sum(part.stored_bytes for part in found.components)


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


def _in_words(events: Iterator[Event]) -> Iterator[Event]:
    """The events; what the package that lends the GPU raises becomes a TRDQError with what it says.

    A used-up quota, a full line and an aborted run arrive as an error of Gradio with a title and a message.
    """
    try:
        yield from events
    except TRDQError:
        raise
    except Exception as error:
        title, message = str(getattr(error, "title", "")), str(getattr(error, "message", "")).strip().rstrip(".")
        if "task aborted" in message:
            raise TRDQError(ABORTED) from error
        if "closed by visitor" in str(error):
            raise Cancelled(LEFT) from error
        if not title.startswith("ZeroGPU") or not message or title == "ZeroGPU worker error":
            log.error("Unforeseen error on the lent GPU", exc_info=error)
            raise TRDQError(UNEXPECTED) from error
        raise TRDQError(
            f"{title}: {message}; sign in, ask for fewer prompts or steps, or duplicate the Space to a machine of your own."
        ) from error


def run(
    spec: RunSpec, folder: Path, on_event: Callable[[Event], None], cancelled: Callable[[], bool]
) -> None:  # fmt: skip
    """Do what `runs.run` does, on the lent GPU; raises what it raises."""
    stop = folder.with_name(folder.name + ".stop")
    last: dict[str, Any] = {}
    try:
        for event in _in_words(run_events(spec.to_json(), str(folder), str(stop))):
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
