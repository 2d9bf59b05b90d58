"""The worker: one job at a time, a line with places, cancelling, and sentences for errors."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from studio.jobs import UNEXPECTED, Busy, Job, Worker, explain
from trdq_core.errors import Cancelled, RecipeError

Say = Callable[[dict[str, Any]], None]


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def blocking(release: threading.Event) -> Callable[[Say, Callable[[], bool]], str]:
    """Work that goes on until it is released or cancelled."""

    def work(say: Say, cancelled: Callable[[], bool]) -> str:
        while not release.is_set():
            if cancelled():
                raise Cancelled("Cancelled during sample; what was finished before is kept.")
            time.sleep(0.005)
        return "result"

    return work


def drain(worker: Worker, job: Job) -> list[dict[str, Any]]:
    return [event for events in worker.follow(job, 0.02) for event in events]


def test_events_come_in_order_and_none_is_lost() -> None:
    worker = Worker()

    def work(say: Say, cancelled: Callable[[], bool]) -> int:
        for index in range(200):
            say({"kind": "progress", "done": index})
        return 7

    job = worker.submit("a", "count", work)
    assert [event["done"] for event in drain(worker, job)] == list(range(200))
    assert (job.state, job.result) == ("done", 7)


def test_a_job_has_the_context_of_the_request_that_asked_for_it() -> None:
    worker, release = Worker(), threading.Event()
    visitor: contextvars.ContextVar[str] = contextvars.ContextVar("visitor", default="nobody")
    first = worker.submit("x", "blocks the line", blocking(release))
    jobs = []
    for name in ("ann", "ben"):
        token = visitor.set(name)
        jobs.append(worker.submit(name, "ask", lambda say, cancelled: visitor.get()))
        visitor.reset(token)
    release.set()
    until(lambda: all(job.finished for job in (first, *jobs)))
    assert [job.result for job in jobs] == ["ann", "ben"]


def test_a_lent_gpu_is_asked_for_in_the_name_of_the_visitor() -> None:
    from gradio.context import LocalContext  # where the package that lends it looks for his token

    worker = Worker()
    token = LocalContext.request.set("his request")
    job = worker.submit("a", "run", lambda say, cancelled: LocalContext.request.get(None))
    LocalContext.request.reset(token)
    until(lambda: job.finished)
    assert job.result == "his request"


def test_only_one_job_holds_the_model() -> None:
    worker, inside, most = Worker(), [0], [0]

    def work(say: Say, cancelled: Callable[[], bool]) -> None:
        assert worker.guard.locked()
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1

    jobs = [worker.submit(str(index), "look", work) for index in range(5)]
    until(lambda: all(job.finished for job in jobs))
    assert most[0] == 1
    assert {job.state for job in jobs} == {"done"}


def test_a_second_visitor_sees_his_place() -> None:
    worker, release = Worker(), threading.Event()
    first = worker.submit("a", "comparison", blocking(release))
    until(lambda: first.state == "running")
    second, third = (worker.submit(name, "comparison", blocking(release)) for name in "bc")
    assert [worker.place(job) for job in (first, second, third)] == [0, 1, 2]
    assert (worker.length(), worker.running_label()) == (3, "comparison")
    worker.cancel("b")
    assert second.state == "cancelled"
    assert worker.place(third) == 1
    release.set()
    until(lambda: third.state == "done")
    assert worker.length() == 0


def test_cancel_stops_a_running_job_and_frees_the_model() -> None:
    worker = Worker()
    job = worker.submit("a", "comparison", blocking(threading.Event()))
    until(lambda: job.state == "running")
    assert worker.cancel("a")
    assert job.cancelling or job.finished
    drain(worker, job)
    assert job.state == "cancelled"
    assert "is kept" in job.text
    until(lambda: not worker.guard.locked())
    assert not worker.cancel("a"), "there is nothing left to cancel"


def test_a_page_that_goes_away_ends_its_job() -> None:
    worker = Worker()
    job = worker.submit("a", "comparison", blocking(threading.Event()))
    follower = worker.follow(job, 0.01)
    next(follower)
    follower.close()  # what gradio does when the tab is closed
    until(lambda: job.state == "cancelled")


def test_one_job_for_each_visitor_and_a_limited_line() -> None:
    worker, release = Worker(longest_line=2), threading.Event()
    first = worker.submit("a", "x", blocking(release))
    until(lambda: first.state == "running")
    with pytest.raises(Busy, match="already have a job"):
        worker.submit("a", "x", blocking(release))
    worker.submit("b", "x", blocking(release))
    worker.submit("c", "x", blocking(release))
    with pytest.raises(Busy, match="try again in a few minutes"):
        worker.submit("d", "x", blocking(release))
    release.set()


def test_errors_become_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()

    def foreseen(say: Say, cancelled: Callable[[], bool]) -> None:
        raise RecipeError("groups: got 9; allowed is 1 to 8.")

    def unforeseen(say: Say, cancelled: Callable[[], bool]) -> None:
        raise KeyError("/secret/folder")

    with caplog.at_level(logging.ERROR):
        jobs = [worker.submit(str(index), "x", work) for index, work in enumerate((foreseen, unforeseen))]
        until(lambda: all(job.finished for job in jobs))
    assert [job.state for job in jobs] == ["failed", "failed"]
    assert jobs[0].text == "groups: got 9; allowed is 1 to 8."
    assert jobs[1].text == UNEXPECTED
    assert "/secret/folder" in caplog.text, "the details belong in the log"
    done = worker.submit("z", "x", lambda say, cancelled: 1)
    until(lambda: done.state == "done")


def test_explain_hides_what_is_not_meant_for_people() -> None:
    assert explain(RecipeError("a sentence.")) == "a sentence."
    assert explain(ValueError("cuda error 0x5")) == UNEXPECTED
