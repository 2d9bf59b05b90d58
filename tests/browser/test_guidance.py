"""The Guidance page in a browser, over the fake core: measure, move the slider, look at heads, apply, try, reload."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Visit
from tests.browser.pressing import choose, open_newest_run, open_tab, press, press_at, push
from tests.browser.test_pages import no_sideways_scrolling, open_sidebar, picture, wait_for_picture
from tests.studio.fake_core import FakeCore
from trdq_core.specs import SharingSpec

pytestmark = pytest.mark.browser
Open = Callable[..., Visit]


@pytest.fixture(autouse=True)
def quick(fake_core: FakeCore) -> Iterator[None]:
    fake_core.runs.pace = 0.005
    yield
    fake_core.runs.pace = 0.01


def go(page: Any) -> None:
    open_tab(page, "Guidance")
    page.wait_for_selector("#measure-attention:visible")


def measure(page: Any) -> None:
    push(page, "#measure-attention")
    page.wait_for_selector("#strip .tr-strip.done >> text=can be chosen again")
    page.wait_for_selector("#blocks-map .tr-map-field")


def move_slider(page: Any, value: float) -> str:
    """Drag the threshold as a pointer does; what the plan says once it has changed."""
    before = page.locator("#sharing-plan .tr-plan-said").inner_text()
    page.locator("#threshold input[type=range]").evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", str(value)
    )
    page.wait_for_function("b => document.querySelector('#sharing-plan .tr-plan-said').innerText !== b", arg=before)
    return str(page.locator("#sharing-plan").inner_text())


@pytest.mark.parametrize("width", [1400, 390])
def test_measure_plan_apply_and_try(visit: Open, fake_url: str, screenshots: Path, width: int) -> None:
    seen = visit(fake_url, width)
    page = seen.page
    go(page)
    measure(page)
    page.wait_for_function("document.querySelectorAll('#temporal .main-svg .scatterlayer .trace').length === 8")
    assert no_sideways_scrolling(page)
    picture(page, screenshots, "5-guidance")

    few, many = move_slider(page, 0.05), move_slider(page, 0.25)
    assert "output error at most 0.05" in few and "output error at most 0.25" in many
    assert "blocks 0 to 1" in few and "blocks 0 to 5" in many
    marked = page.locator("#blocks-map .tr-map-shared")
    assert marked.count() == 6
    push(page, "#published")
    page.wait_for_selector("#sharing-plan >> text=the published list")
    push(page, "#no-sharing")
    page.wait_for_selector("#sharing-plan >> text=No block is shared")
    assert marked.count() == 0
    move_slider(page, 0.15)

    push(page, "#apply-plan")
    page.wait_for_selector("#applied .tr-notice.done")
    page.wait_for_selector("#plan-command >> text=--sharing plan.json")
    with page.expect_download() as download:
        push(page, "#plan-file")
    assert download.value.suggested_filename == "plan.json"
    assert SharingSpec.from_json(Path(download.value.path()).read_text()).blocks == ((0, 1, 2, 3),)

    push(page, "#try")
    page.wait_for_selector("#trial-numbers .tr-table")
    for part in ("#trial-without", "#trial-with", "#trial-difference"):
        wait_for_picture(page, part)
    assert "PSNR with against without sharing" in page.locator("#trial-numbers").inner_text()
    assert no_sideways_scrolling(page)
    press(page.locator("#similarity-numbers button").first)
    page.wait_for_selector("#group-table table:visible")
    assert no_sideways_scrolling(page)
    picture(page, screenshots, "6-guidance-tried")
    seen.check()


def test_a_cell_is_chosen_by_pointer_and_by_keyboard(visit: Open, fake_url: str) -> None:
    seen = visit(fake_url)
    page = seen.page
    go(page)
    measure(page)
    field = page.locator("#blocks-map .tr-map-field")
    numbers = json.loads(field.get_attribute("data-map"))
    press_at(field, 2.5 / len(numbers["t"]), 5.5 / len(numbers["v"]))
    page.wait_for_selector("#heads-map >> text=Heads of block 5")
    said = page.locator("#blocks-map .tr-map-say").inner_text()
    assert said.startswith(f"block 5, timestep {numbers['t'][2]}: output error {numbers['v'][5][2]}") or "Point" in said
    field = page.locator("#blocks-map .tr-map-field")
    field.press("ArrowUp")
    field.press("ArrowRight")
    line = page.locator("#blocks-map .tr-map-say").inner_text()
    assert line.startswith(f"block 4, timestep {numbers['t'][3]}: output error {numbers['v'][4][3]}")
    field.press("Enter")
    page.wait_for_selector("#heads-map >> text=Heads of block 4")
    page.wait_for_function("document.activeElement.matches('#blocks-map .tr-map-field')")
    assert page.locator("#block input").input_value() == "block 4"
    choose(page, "#block", "block 7")
    page.wait_for_selector("#heads-map >> text=Heads of block 7")
    press(page.locator("#measure label", has_text="Map cosine"))
    page.wait_for_selector("#sharing-plan >> text=map cosine at least")
    seen.check()


def test_an_applied_plan_reaches_the_comparison(visit: Open, fake_url: str, screenshots: Path) -> None:
    seen = visit(fake_url)
    page = seen.page
    assert page.locator("#share input").is_disabled()
    go(page)
    measure(page)
    push(page, "#apply-plan")
    page.wait_for_selector("#applied .tr-notice.done")
    page.wait_for_function("document.querySelector('#share input').checked")
    assert "saves" in page.locator("#share").inner_text()
    open_tab(page, "Compare")
    push(page, "#compare")
    page.wait_for_selector("#strip .tr-strip.done >> text=It is kept under Runs")
    wait_for_picture(page, "#picture-chosen")
    heads = page.locator(".tr-head b").all_inner_texts()
    assert {"TR-DQ W4A8", "TR-DQ W4A8 + sharing"} <= set(heads)
    picture(page, screenshots, "7-compare-sharing")
    open_tab(page, "Runs")
    open_newest_run(page)
    page.wait_for_selector("#run-metrics >> text=FP32 + sharing")
    wait_for_picture(page, "#run-pictures")
    picture(page, screenshots, "8-runs-sharing")
    seen.check()


def test_bad_input_cancel_and_reload(visit: Open, fake_url: str, fake_core: FakeCore) -> None:
    page = visit(fake_url).page
    guidance = page.locator("#guidance input[type=number]")
    guidance.fill("1")
    guidance.press("Enter")
    go(page)
    push(page, "#measure-attention")
    page.wait_for_selector("#problem >> text=which has one branch")
    guidance.fill("3.5")
    guidance.press("Enter")
    measure(page)
    push(page, "#try")
    page.wait_for_selector("#trial-numbers .tr-table")
    page.wait_for_function("localStorage.getItem('trdq-studio-trial')")
    fake_core.runs.pace = 0.3
    push(page, "#measure-attention")
    page.wait_for_selector("#strip .tr-strip.running >> text=left in this stage")
    push(page, "#cancel-attention")
    page.wait_for_selector("#strip .tr-strip.cancelled")
    fake_core.runs.pace = 0.005
    page.reload()
    go(page)
    page.wait_for_selector("#blocks-map .tr-map-field")
    page.wait_for_selector("#trial-numbers .tr-table")
    wait_for_picture(page, "#trial-with")
    assert re.search(r"prompts? · \d+ steps", page.locator("#measurement input").input_value())


def test_a_phone_reaches_every_tab_and_the_tick_box(visit: Open, fake_url: str) -> None:
    page = visit(fake_url, 390).page
    for name in ("Compare", "Activations", "Guidance", "Runs"):
        assert page.get_by_role("tab", name=name, exact=True).is_visible()
    open_sidebar(page)
    page.locator("#share").scroll_into_view_if_needed()
    assert "Guidance page makes one" in page.locator("#share").inner_text()
