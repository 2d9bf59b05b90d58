"""Presses on pages that still move.

Pictures and charts come late and shift what lies below them. A pointer that goes down on a button and up beside it has pressed
nothing, so the tests press the element itself, and press again where the page shows that nothing came of it, as a person does.
"""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import TimeoutError as TookTooLong

TRIES = 3
# A cell of a table is chosen when the pointer goes down.
PRESSED = """async (e) => {
  while (e.disabled) await new Promise((go) => setTimeout(go, 20));
  if (e.role === 'gridcell') e.dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
  e.click();
}"""


def press(target: Any, done: str = "true") -> None:
    """Press what a locator finds, until `done`, an expression of JavaScript, is true.

    Give `done` for what may be pressed twice.
    """
    for tries_left in reversed(range(TRIES)):
        target.wait_for()
        target.evaluate(PRESSED)
        try:
            target.page.wait_for_function(done)
        except TookTooLong:
            if not tries_left:
                raise
        else:
            return


def push(page: Any, button: str, done: str = "true") -> None:
    """Press the button of a selector."""
    press(page.locator(button), done)


def press_at(target: Any, x: float, y: float) -> None:
    """Press a field at shares of its width and height, wherever it is by now."""
    target.wait_for()
    target.evaluate(
        """(e, [x, y]) => {
          const box = e.getBoundingClientRect();
          const clientX = box.left + x * box.width, clientY = box.top + y * box.height;
          e.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX, clientY}));
        }""",
        [x, y],
    )


def open_tab(page: Any, name: str) -> None:
    """Open a page of the studio; on a phone the last ones are behind a button."""
    here = page.get_by_role("tab", name=name, exact=True)
    more = page.locator(".overflow-menu button").first
    here.or_(more).first.wait_for()
    if here.is_visible():
        chosen = "[...document.querySelectorAll('[role=tab][aria-selected=true]')]"
        press(here, f"{chosen}.some((tab) => tab.innerText.trim() === {json.dumps(name)})")
    else:
        press(more)
        press(page.get_by_role("button", name=name, exact=True))


def open_newest_run(page: Any) -> None:
    """Choose the first row of the Runs page, which is open."""
    row = page.locator("#runs-table [role=gridcell]:visible").first
    press(row, "document.querySelector('#opened-run')?.checkVisibility()")


def choose(page: Any, dropdown: str, option: str | int) -> None:
    """Choose an option of the dropdown of a selector by its name, or another than the present one by its place."""
    field = page.locator(f"{dropdown} input")
    value = f"document.querySelector({json.dumps(f'{dropdown} input')}).value"
    if isinstance(option, str):
        wanted, chosen = page.get_by_role("option", name=option, exact=True), f"{value} === {json.dumps(option)}"
    else:
        wanted, chosen = page.get_by_role("option").nth(option), f"{value} !== {json.dumps(field.input_value())}"
    for tries_left in reversed(range(TRIES)):
        field.wait_for()
        field.evaluate("e => { e.blur(); e.focus(); }")
        try:
            wanted.dispatch_event("mousedown")
            page.wait_for_function(chosen)
        except TookTooLong:
            if not tries_left:
                raise
        else:
            return
