"""Buttons of pages that still move: pictures and charts above them come late, and a pointer then hits something else."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import TimeoutError as TookTooLong

TRIES = 3


def push(page: Any, button: str, done: str = "true") -> None:
    """Press the button of a selector wherever it is by now, until `done`, an expression of JavaScript, is true.

    Give `done` for buttons that may be pressed twice. A person presses again too when nothing happens.
    """
    for tries_left in reversed(range(TRIES)):
        page.locator(button).wait_for()
        page.wait_for_function("b => !document.querySelector(b).disabled", arg=button)
        page.locator(button).evaluate("b => b.click()")
        try:
            page.wait_for_function(done)
        except TookTooLong:
            if not tries_left:
                raise
        else:
            return
