"""Progress: counts, an estimate of the time left, and a stop when the person asks for it."""

from __future__ import annotations

import pytest

from trdq_core.errors import Cancelled
from trdq_core.events import Event, Progress


def test_every_unit_is_told_with_what_is_left() -> None:
    events: list[Event] = []
    progress = Progress("sample", 3, on_event=events.append, recipe="rtn-w8a8")
    for prompt in ("owl", "crab", "whale"):
        progress.advance(prompt)
    assert [event["done"] for event in events] == [1, 2, 3]
    assert {(e["kind"], e["stage"], e["total"], e["recipe"]) for e in events} == {("progress", "sample", 3, "rtn-w8a8")}
    assert [event["detail"] for event in events] == ["owl", "crab", "whale"]
    assert events[0]["eta_seconds"] is None, "one unit says nothing about the next"
    assert events[1]["eta_seconds"] >= 0
    assert events[2]["eta_seconds"] == 0


def test_a_stop_comes_after_the_unit_is_told() -> None:
    events: list[Event] = []
    progress = Progress("calibrate", 9, on_event=events.append, cancelled=lambda: len(events) >= 2)
    progress.advance()
    with pytest.raises(Cancelled, match=r"Cancelled during calibrate; what was finished before is kept\."):
        progress.advance()
    assert len(events) == 2
