"""Every page at two widths, light and dark; bad input; Cancel; a second visitor. Over the fake core, so that it is quick."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Visit
from tests.browser.pressing import choose, open_newest_run, open_tab, press, push
from tests.studio.fake_core import FakeCore

pytestmark = pytest.mark.browser
Open = Callable[..., Visit]


@pytest.fixture(autouse=True)
def usual_pace(fake_core: FakeCore) -> Iterator[None]:
    """Each test begins with short steps."""
    fake_core.runs.pace = 0.01
    yield
    fake_core.runs.pace = 0.01


def open_sidebar(page: Any) -> None:
    if page.viewport_size["width"] < 768:
        press(page.locator(".sidebar .toggle-button"))
        page.wait_for_timeout(400)


def start(page: Any, button: str) -> None:
    open_sidebar(page)
    push(page, f"#{button}")


def no_sideways_scrolling(page: Any) -> bool:
    return bool(page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth + 1"))


def picture(page: Any, folder: Path, name: str) -> None:
    """Screenshots of the whole page, light and dark; scrolled through first, since pictures below the edge load late."""
    for theme in ("dark", "light"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        page.wait_for_timeout(350)  # colours fade from one theme to the other
        page.screenshot(path=folder / f"{page.viewport_size['width']}-{theme}-{name}.png", full_page=True)


def wait_for_picture(page: Any, selector: str) -> None:
    page.locator(f"{selector} img").first.scroll_into_view_if_needed()
    page.wait_for_function("s => document.querySelector(s + ' img')?.naturalWidth > 0", arg=selector)


@pytest.mark.parametrize("width", [1400, 390])
def test_every_page_is_readable(visit: Open, fake_url: str, screenshots: Path, width: int) -> None:
    seen = visit(fake_url, width)
    page = seen.page
    picture(page, screenshots, "1-start")
    start(page, "compare")
    page.wait_for_selector("#strip .tr-strip.done")
    for part in ("#picture-reference", "#picture-baseline", "#picture-chosen", "#wipe", "#difference"):
        wait_for_picture(page, part)
    page.wait_for_function("document.querySelectorAll('#sqnr .main-svg .scatterlayer .trace').length == 2")
    assert page.locator(".tr-badge.int4").count() >= 2
    assert no_sideways_scrolling(page)
    picture(page, screenshots, "2-compare")
    open_tab(page, "Activations")
    page.wait_for_selector("#facts .tr-facts")
    page.wait_for_function("document.querySelectorAll('#histogram .main-svg .barlayer .trace').length == 2")
    page.wait_for_function("document.querySelectorAll('#timeline .main-svg .shapelayer path').length == 6")
    assert no_sideways_scrolling(page)
    picture(page, screenshots, "3-activations")
    open_tab(page, "Runs")
    open_newest_run(page)
    page.wait_for_selector("#run-metrics .tr-table")
    wait_for_picture(page, "#run-pictures")
    assert no_sideways_scrolling(page)
    picture(page, screenshots, "4-runs")
    seen.check()


def test_dark_mode_can_be_asked_for(visit: Open, fake_url: str) -> None:
    page = visit(fake_url, 1400, True).page
    paper = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    assert sum(int(part) for part in re.findall(r"\d+", paper)[:3]) < 150
    card = page.locator(".tr-card").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert sum(int(part) for part in re.findall(r"\d+", card)[:3]) < 150


def test_the_sidebar_leaves_a_phone_to_the_page(visit: Open, fake_url: str, screenshots: Path) -> None:
    page = visit(fake_url, 390).page
    page.wait_for_function("!document.querySelector('.sidebar').classList.contains('open')")
    open_sidebar(page)
    page.screenshot(path=screenshots / "390-light-0-sidebar.png")
    assert page.locator("#compare").is_visible()


def test_the_plan_follows_and_bad_input_gives_one_sentence_each(visit: Open, fake_url: str) -> None:
    seen = visit(fake_url)
    page = seen.page
    for prompt, said in (("", "it is empty"), ("x" * 10_000, "10,000 characters")):
        page.locator("#prompt textarea").fill(prompt)
        push(page, "#compare")
        page.wait_for_function(f"document.querySelector('#problem')?.innerText.includes({said!r})")
        page.locator("[data-testid='toast-body']").filter(has_text=said).first.wait_for()
    page.locator("#prompt textarea").fill("owl")
    page.locator("#groups input[type=number]").fill("40")
    page.locator("#groups input[type=number]").press("Enter")
    page.wait_for_function("document.querySelector('#problem')?.innerText.includes('as many groups as steps')")
    push(page, "#compare")
    page.wait_for_selector("[data-testid='toast-body'] >> text=as many groups as steps")
    page.locator("#groups input[type=number]").fill("2")
    page.locator("#groups input[type=number]").press("Enter")
    page.wait_for_function("!document.querySelector('#problem')?.innerText.trim()")
    choose(page, "#method", "ViDiT-Q")
    press(page.locator("#weight-bits label", has_text="8"))
    page.wait_for_selector("#plan >> text=vidit-q-w8a8")
    press(page.locator("#plan-layers button").first)
    page.wait_for_selector(".tr-table >> text=proj_out")
    assert page.locator(".tr-table tr.kept").count() == 1
    seen.check()


def test_cancel_stops_within_two_steps(visit: Open, fake_url: str, fake_core: FakeCore) -> None:
    fake_core.runs.pace = 0.5
    page = visit(fake_url).page
    push(page, "#compare")
    page.wait_for_selector("#strip .tr-strip.running")
    push(page, "#cancel")
    page.wait_for_selector("#strip .tr-strip.cancelled", timeout=5000)
    assert "is kept" in page.locator("#strip").inner_text()
    info = fake_core.runs.list_runs()[0]
    assert info.state == "cancelled"


def test_a_second_visitor_sees_his_place(visit: Open, fake_url: str, fake_core: FakeCore) -> None:
    fake_core.runs.pace = 0.4
    first, second = visit(fake_url).page, visit(fake_url).page
    push(first, "#compare")
    first.wait_for_selector("#strip .tr-strip.running")
    push(second, "#compare")
    second.wait_for_selector("#strip >> text=You are number 1 in line")
    first.wait_for_selector("#header >> text=2 in line")
    push(first, "#cancel")
    second.wait_for_selector("#strip .tr-strip.running")
    push(second, "#cancel")
    second.wait_for_selector("#strip .tr-strip.cancelled")


def test_a_closed_tab_frees_the_model(visit: Open, fake_url: str, fake_core: FakeCore) -> None:
    fake_core.runs.pace = 0.4
    first = visit(fake_url).page
    push(first, "#compare")
    first.wait_for_selector("#strip .tr-strip.running")
    first.close()
    second = visit(fake_url).page
    second.wait_for_selector("#header >> text=idle")


def test_closer_look_download_and_reload(visit: Open, fake_url: str) -> None:
    """The wipe and the gain follow their choices, the archive comes, and a reload loses nothing that finished."""
    page = visit(fake_url).page
    page.locator("#seed input").fill("77")
    push(page, "#compare")
    page.wait_for_selector("#strip .tr-strip.done")
    wait_for_picture(page, "#difference")
    before = page.locator("#difference img").get_attribute("src")
    press(page.locator("#gain label", has_text="x16"))
    page.wait_for_selector(".tr-scale >> text=16 of 255")
    page.wait_for_function("b => document.querySelector('#difference img').src !== b", arg=before)
    before = page.locator("#difference img").get_attribute("src")
    choose(page, "#wipe-left", "RTN W4A8")
    page.wait_for_function("b => document.querySelector('#difference img').src !== b", arg=before)
    with page.expect_download() as download:
        push(page, "#download")
    assert re.fullmatch(r".*compare.*\.zip", download.value.suggested_filename)
    page.wait_for_function("localStorage.getItem('trdq-studio')")
    page.reload()
    wait_for_picture(page, "#picture-chosen")
    assert "(seed 77)" in page.locator(".tr-same").first.inner_text()
    open_tab(page, "Runs")
    open_newest_run(page)
    page.wait_for_selector("#opened-run #load-settings")
    push(page, "#load-settings", "document.querySelector('#seed input').value === '77'")
