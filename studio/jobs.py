"""The one worker that may touch the model, and the line of jobs that wait for it."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from trdq_core.errors import Cancelled, TRDQError

log = logging.getLogger(__name__)

Event = dict[str, Any]
JobState = Literal["waiting", "running", "done", "cancelled", "failed"]
Work = Callable[[Callable[[Event], None], Callable[[], bool]], Any]

FINISHED: tuple[JobState, ...] = ("done", "cancelled", "failed")
LONGEST_LINE = 12
UNEXPECTED = "Something went wrong inside the studio; the details are in its log. What was finished before is kept."


class Busy(TRDQError):
    """The line is full, or this visitor already has a job in it."""


def explain(error: BaseException) -> str:
    """The sentence to show for `error`; an unforeseen one goes to the log with its traceback, never to the page."""
    if isinstance(error, TRDQError):
        return str(error)
    log.error("Unforeseen error", exc_info=error)
    return UNEXPECTED


@dataclass(eq=False)
class Job:
    """One piece of work for the model and what is known of it so far."""

    session: str
    label: str
    work: Work
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: JobState = "waiting"
    text: str = ""
    result: Any = None
    started: float | None = None
    ended: float | None = None
    # Of the request that brought the job: a GPU that is lent by the call is lent to the visitor whom this names.
    _context: contextvars.Context = field(default_factory=contextvars.copy_context)
    _events: deque[Event] = field(default_factory=deque)
    _cancel: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come from this job."""
        return self.state in FINISHED

    @property
    def cancelling(self) -> bool:
        """Whether it was asked to stop and has not stopped yet."""
        return self._cancel.is_set() and not self.finished

    def cancel(self) -> None:
        """Ask the job to stop; the core looks at this between sampler steps."""
        self._cancel.set()
        with self._changed:
            self._changed.notify_all()

    def cancelled(self) -> bool:
        """Whether the job was asked to stop."""
        return self._cancel.is_set()

    def report(self, event: Event) -> None:
        """Take an event from the core; called on the worker's thread."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def take_events(self) -> list[Event]:
        """The events that nobody has taken yet, oldest first."""
        with self._changed:
            taken = list(self._events)
            self._events.clear()
        return taken

    def wait(self, seconds: float) -> None:
        """Return when something happened or `seconds` have passed."""
        with self._changed:
            if not self._events and not self.finished:
                self._changed.wait(seconds)

    def wait_finished(self, seconds: float) -> None:
        """Return when the job is over or `seconds` have passed."""
        with self._changed:
            self._changed.wait_for(lambda: self.finished, max(0.0, seconds))

    def do(self) -> Any:
        """The work itself, on the worker's thread, with the context variables of the request that asked for it."""
        return self._context.run(self.work, self.report, self.cancelled)

    def settle(self, state: JobState, text: str = "") -> None:
        """Set the state and wake whoever waits."""
        with self._changed:
            self.state, self.text = state, text
            if state == "running":
                self.started = time.monotonic()
            elif state in FINISHED:
                self.ended = time.monotonic()
            self._changed.notify_all()


class Worker:
    """One thread that runs jobs in order. `guard` is held while a job runs: nothing else may use the model then."""

    def __init__(self, longest_line: int = LONGEST_LINE) -> None:
        self.guard = threading.Lock()
        self._line: deque[Job] = deque()
        self._running: Job | None = None
        self._woken = threading.Condition()
        self._longest_line = longest_line
        self._thread: threading.Thread | None = None

    def submit(self, session: str, label: str, work: Work) -> Job:
        """A new job at the end of the line; Busy if the line is full or this session already has one."""
        job = Job(session=session, label=label, work=work)
        with self._woken:
            if self._of_session(session):
                raise Busy("You already have a job here; wait for it, or press Cancel first.")
            if len(self._line) >= self._longest_line:
                raise Busy(
                    f"{len(self._line)} jobs are waiting already, which is the most; try again in a few minutes."
                )
            self._line.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="model-worker", daemon=True)
                self._thread.start()
            self._woken.notify_all()
        return job

    def place(self, job: Job) -> int:
        """How many jobs come before this one; 0 when it runs or is over."""
        with self._woken:
            if job not in self._line:
                return 0
            return self._line.index(job) + (1 if self._running is not None else 0)

    def length(self) -> int:
        """Jobs that run or wait."""
        with self._woken:
            return len(self._line) + (1 if self._running is not None else 0)

    def running_label(self) -> str:
        """What runs now; empty when the model is free."""
        running = self._running
        return running.label if running else ""

    def cancel(self, session: str) -> bool:
        """Ask this session's job to stop; whether there was one."""
        with self._woken:
            jobs = self._of_session(session)
            for job in jobs:
                self._stop(job)
        return bool(jobs)

    def cancel_job(self, job: Job) -> None:
        """Ask one job to stop; a waiting one leaves the line at once."""
        with self._woken:
            self._stop(job)

    def follow(self, job: Job, every: float = 0.25) -> Iterator[list[Event]]:
        """New events of `job` about every `every` seconds until it is over; the job is stopped if the caller goes away.

        Events that come faster are handed on together: a page that redraws at every step slows what it watches.
        """
        last = 0.0
        try:
            while True:
                job.wait(every)
                job.wait_finished(last + every / 2 - time.monotonic())
                last = time.monotonic()
                over = job.finished
                yield job.take_events()
                if over:
                    return
        finally:
            if not job.finished:
                self.cancel_job(job)

    def _of_session(self, session: str) -> list[Job]:
        jobs = [*self._line, *([self._running] if self._running else [])]
        return [job for job in jobs if job.session == session and not job.finished]

    def _stop(self, job: Job) -> None:
        job.cancel()
        if job in self._line:
            self._line.remove(job)
            job.settle("cancelled", "Cancelled before it began.")

    def _work(self) -> None:
        while True:
            with self._woken:
                while not self._line:
                    self._woken.wait()
                job = self._line.popleft()
                self._running = job
                job.settle("running")
            try:
                with self.guard:
                    job.result = job.do()
                job.settle("done")
            except Cancelled as error:
                job.settle("cancelled", str(error))
            except Exception as error:  # the worker must outlive any job
                job.settle("failed", explain(error))
            finally:
                with self._woken:
                    self._running = None
