"""The whole job on the real core: choose, calibrate, compare, wipe, look at a histogram, come back and find the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Visit
from tests.browser.pressing import choose, open_tab, press, push
from tests.browser.test_pages import wait_for_picture

pytestmark = [pytest.mark.browser, pytest.mark.slow]
STEPS = 4  # few, since every machine that runs this shares its cores
LONG = 170_000  # ms


def set_number(page: Any, control: str, value: int) -> None:
    field = page.locator(f"#{control} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_choose_calibrate_compare_look_and_come_back(
    visit: Callable[..., Visit], real_url: str, screenshots: Path
) -> None:
    seen = visit(real_url)
    page = seen.page
    choose(page, "#method", "TR-DQ")
    press(page.locator("#weight-bits label", has_text="4"))
    press(page.locator("#activation-bits label", has_text="8"))
    set_number(page, "groups", 4)
    set_number(page, "steps", STEPS)
    page.wait_for_selector("#plan >> text=tr-dq-w4a8")
    page.wait_for_selector("#plan >> text=No stored calibration fits")
    page.screenshot(path=screenshots / "real-1-plan.png", full_page=True)

    push(page, "#calibrate")
    page.wait_for_selector("#strip .tr-strip.running")
    page.screenshot(path=screenshots / "real-2-calibrating.png")
    page.wait_for_selector("#strip .tr-strip.done", timeout=LONG)
    page.wait_for_selector("#plan >> text=Calibration that will be used again")

    push(page, "#compare")
    page.wait_for_selector("#strip .tr-strip.running")
    page.wait_for_selector("#strip .tr-strip.done", timeout=LONG)
    for part in ("#picture-reference", "#picture-baseline", "#picture-chosen", "#wipe", "#difference"):
        wait_for_picture(page, part)
    page.wait_for_function("document.querySelectorAll('#sqnr .main-svg .scatterlayer .trace').length == 2")
    text = page.locator("#pages").inner_text()
    assert "FP32" in text or "FP16" in text
    assert "Noise floor" in text
    assert page.locator(".tr-column .tr-badge.int4").count() >= 1
    page.screenshot(path=screenshots / "real-3-compare.png", full_page=True)
    handle = page.locator("#wipe .inner, #wipe .handle, #wipe [role=slider]").first
    if handle.count():
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 90, box["y"] + box["height"] / 2, steps=4)
        page.mouse.up()
    press(page.locator("#gain label", has_text="x16"))
    page.wait_for_selector(".tr-scale >> text=16 of 255")

    open_tab(page, "Activations")
    page.wait_for_selector("#facts .tr-facts", timeout=LONG)
    assert page.locator("#histogram .main-svg .barlayer .trace").count() == 2
    assert page.locator("#timeline .main-svg .shapelayer path").count() == 6
    page.screenshot(path=screenshots / "real-4-activations.png", full_page=True)

    page.reload()
    wait_for_picture(page, "#picture-chosen")
    open_tab(page, "Runs")
    press(page.locator("#runs-table [role=gridcell]:visible", has_text="compare").first)
    page.wait_for_selector("#run-metrics .tr-table >> text=TR-DQ W4A8")
    page.screenshot(path=screenshots / "real-5-runs.png", full_page=True)
    seen.check()
