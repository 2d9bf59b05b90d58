"""How long work reports itself: events, estimates of the time left, cancelling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trdq_core.errors import Cancelled

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of nobody."""


class Progress:
    """Counts the units of one stage, reports each with the time left, and stops the work when the person cancels."""

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        on_event: OnEvent = ignore,
        cancelled: Callable[[], bool] | None = None,
        recipe: str | None = None,
        done: int = 0,
    ) -> None:
        self._stage, self._total, self._recipe = stage, total, recipe
        self._on_event, self._cancelled = on_event, cancelled
        self._started, self._done, self._resumed = time.monotonic(), done, done

    def advance(self, detail: str = "") -> None:
        """One unit is finished; raises Cancelled if the person asked to stop."""
        self._done += 1
        elapsed = time.monotonic() - self._started
        worked = self._done - self._resumed
        left = elapsed / worked * (self._total - self._done)
        self._on_event(
            {
                "kind": "progress",
                "stage": self._stage,
                "done": self._done,
                "total": self._total,
                "eta_seconds": round(left, 1) if worked > 1 else None,
                "detail": detail,
                "recipe": self._recipe,
            }
        )
        self.check()

    def skip(self, units: int) -> None:
        """Some units were finished by an earlier start: they count as done, and not into the pace."""
        self._done, self._resumed = self._done + units, self._resumed + units

    def check(self) -> None:
        """Raise Cancelled if the person asked to stop."""
        if self._cancelled is not None and self._cancelled():
            raise Cancelled(f"Cancelled during {self._stage}; what was finished before is kept.")
