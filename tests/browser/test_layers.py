"""The Layers page in a browser, over the fake core: scan, sort, change a layer, fit a budget, save, choose on Compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Visit
from tests.browser.pressing import choose, open_tab, press, push
from tests.browser.test_pages import no_sideways_scrolling, open_sidebar, picture
from tests.studio.fake_core import LAYERS, FakeCore
from trdq_core.presets import METHODS
from trdq_core.specs import Recipe

pytestmark = pytest.mark.browser
Open = Callable[..., Visit]


@pytest.fixture(autouse=True)
def quick(fake_core: FakeCore) -> Iterator[None]:
    fake_core.runs.pace = 0.005
    yield
    fake_core.runs.pace = 0.01


def go(page: Any) -> None:
    open_tab(page, "Layers")
    page.wait_for_selector("#run-scan:visible")
    page.wait_for_selector("#edit-totals .tr-cards")


def scan(page: Any) -> None:
    push(page, "#run-scan")
    page.wait_for_selector("#strip .tr-strip.done >> text=can be chosen again")
    page.wait_for_function("document.querySelectorAll('#scan-chart .main-svg .barlayer .trace').length === 3")


def names_on_chart(page: Any) -> list[str]:
    return list(page.locator("#scan-chart .xaxislayer-above text").all_text_contents())


def until_totals_change(page: Any, button: str) -> str:
    cards = page.locator("#edit-totals .tr-cards")
    before = cards.inner_text()
    push(page, button, f"document.querySelector('#edit-totals .tr-cards').innerText !== {json.dumps(before)}")
    return str(cards.inner_text())


def pick_first(page: Any) -> None:
    cell = page.locator("#edit-table [role=gridcell]:visible").first
    press(cell, "document.querySelector('#edit-picked').innerText.includes('blocks.0.attn1.to_q')")


@pytest.mark.parametrize("width", [1400, 390])
def test_scan_change_save_and_choose(visit: Open, fake_url: str, screenshots: Path, width: int) -> None:
    seen = visit(fake_url, width)
    page = seen.page
    go(page)
    scan(page)
    page.wait_for_selector("#edit-totals >> text=a scan with RTN")
    assert no_sideways_scrolling(page)
    model_order = names_on_chart(page)
    assert len(model_order) == len(LAYERS)
    press(page.locator("#scan-order label", has_text="Role"))
    page.wait_for_function(
        "b => document.querySelector('#scan-chart .xaxislayer-above')?.textContent !== b", arg="".join(model_order)
    )
    pick_first(page)
    totals = until_totals_change(page, "#edit-skip")
    assert "1 skipped" in totals
    assert page.locator("#edit-table [role=gridcell]:visible", has_text="skip").count() >= 1
    picture(page, screenshots, "9-layers")
    assert "9 of 9" in until_totals_change(page, "#edit-fit")
    pick_first(page)
    assert "1 skipped" in until_totals_change(page, "#edit-skip")

    name = f"plan-{width}"
    page.locator("#recipe-name :is(input, textarea)").fill(name)
    push(page, "#recipe-save")
    page.wait_for_selector("#recipe-saved .tr-notice.done")
    page.wait_for_selector("#edit-command >> text=--recipe-file")
    with page.expect_download() as download:
        push(page, "#recipe-file")
    saved = Recipe.from_json(Path(download.value.path()).read_text())
    assert (saved.name, saved.rules[0].weight) == (name, None)
    push(page, "#recipe-use")
    page.wait_for_selector(f"#plan >> text={name}")
    open_sidebar(page)
    assert page.locator("#method input").input_value() == f"{name} (saved recipe)"
    assert "1 layer in full precision" in page.locator("#method-line").inner_text()
    push(page, "#compare")
    page.wait_for_selector("#strip .tr-strip.done >> text=It is kept under Runs")
    assert name in page.locator(".tr-head b").all_inner_texts()
    picture(page, screenshots, "10-compare-saved")
    seen.check()


def test_a_saved_recipe_is_offered_after_a_reload(visit: Open, fake_url: str, fake_core: FakeCore) -> None:
    page = visit(fake_url).page
    go(page)
    page.locator("#recipe-name :is(input, textarea)").fill("Not a name")
    push(page, "#recipe-save")
    page.wait_for_selector("#recipe-saved >> text=small letters")
    page.locator("#recipe-name :is(input, textarea)").fill("after-reload")
    push(page, "#recipe-save")
    page.wait_for_selector("#recipe-saved .tr-notice.done")
    page.reload()
    page.wait_for_selector("#plan .tr-cards")
    choose(page, "#baseline", "after-reload (saved recipe)")
    push(page, "#compare")
    page.wait_for_selector("#strip .tr-strip.done")
    assert "after-reload" in page.locator(".tr-head b").all_inner_texts()


def test_cancel_and_bad_input(visit: Open, fake_url: str, fake_core: FakeCore) -> None:
    page = visit(fake_url).page
    go(page)
    push(page, "#edit-skip", "document.querySelector('#edit-note').innerText.includes('none is picked')")
    fake_core.runs.pace = 0.3
    push(page, "#run-scan")
    page.wait_for_selector("#strip .tr-strip.running >> text=left in this stage")
    push(page, "#cancel-scan")
    page.wait_for_selector("#strip .tr-strip.cancelled")


def test_all_methods_are_listed_with_what_they_are(visit: Open, fake_url: str, screenshots: Path) -> None:
    seen = visit(fake_url)
    page = seen.page
    press(page.locator("#all-methods button").first)
    table = page.locator("#all-methods .tr-table")
    table.wait_for()
    assert table.locator("tbody tr").count() == len(METHODS) - 1, "all but full precision"
    assert "learns rounding (minutes)" in table.inner_text()
    choose(page, "#method", "TQ-DiT (simulated)")
    page.wait_for_selector("#method-line .tr-badge.simulated")
    page.wait_for_selector("#plan >> text=tq-dit-w4a8")
    picture(page, screenshots, "11-methods")
    seen.check()
