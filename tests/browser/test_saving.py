"""Saving a column as a model for diffusers, and fetching it, over the fake core."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Visit
from tests.browser.pressing import press, push
from tests.browser.test_pages import no_sideways_scrolling, picture, start
from tests.studio.fake_core import FakeCore

pytestmark = pytest.mark.browser
Open = Callable[..., Visit]


@pytest.mark.parametrize("width", [1400, 390])
def test_a_column_is_saved_and_fetched(
    visit: Open, fake_url: str, fake_core: FakeCore, screenshots: Path, tmp_path: Path, width: int
) -> None:
    fake_core.runs.pace = 0.01
    seen = visit(fake_url, width)
    page = seen.page
    assert not page.locator("#save-model").is_visible()
    page.wait_for_timeout(200)
    start(page, "compare")
    page.wait_for_selector("#strip .tr-strip.done")
    page.locator("#save-start").scroll_into_view_if_needed()
    if width > 600:
        the_chart_follows_the_sidebar(page)
    assert "--recipe tr-dq-w4a8" in page.locator("#save-command").inner_text()
    push(page, "#save-start")
    page.wait_for_selector("#strip .tr-strip.done >> text=Saving tr-dq-w4a8 as a model")
    page.wait_for_selector("#save-said >> text=it samples the same bits")
    said = page.locator("#save-said").inner_text()
    assert "Saved: 3.0 MiB" in said and "Saved in" not in said, "no place on the disk for who may be elsewhere"
    push(page, "#save-pack")
    page.wait_for_selector("#save-download:visible")
    picture(page, screenshots, "5-saved")
    with page.expect_download() as download:
        push(page, "#save-download")
    file = tmp_path / "model.zip"
    download.value.save_as(file)
    names = zipfile.ZipFile(file).namelist()
    assert "pocket-image-tr-dq-w4a8/model_index.json" in names and len(names) == 2
    assert no_sideways_scrolling(page)
    page.reload()
    page.wait_for_selector("#save-said >> text=it samples the same bits")
    assert page.locator("#save-pack").is_visible(), "what was saved before is offered again"
    seen.check()


def the_chart_follows_the_sidebar(page: Any) -> None:
    """Closing and opening it changes the page's width, and the chart's with it."""
    wide = "document.querySelector('#sqnr{}')?.clientWidth"
    fits = f"() => Math.abs({wide.format(' .main-svg')} - {wide.format('')}) < 40"
    before = page.locator("#sqnr").bounding_box()["width"]
    for wider in (True, False):
        press(page.locator(".sidebar .toggle-button"))
        page.wait_for_function(
            f"(document.querySelector('#sqnr').clientWidth > {before + 50}) === {str(wider).lower()}"
        )
        page.wait_for_function(fits)
