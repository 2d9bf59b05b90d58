"""The Profile page in a browser, over the fake core."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.conftest import Visit
from tests.browser.pressing import open_tab, press
from tests.browser.test_pages import no_sideways_scrolling, picture
from tests.studio import fake_profile
from tests.studio.fake_core import FakeCore

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [1400, 390])
def test_a_stored_profile_is_drawn(
    visit: Callable[..., Visit], fake_url: str, fake_core: FakeCore, screenshots: Path, width: int
) -> None:
    """The bars, the roofline and both tables, at two widths; before that, what to do."""
    seen = visit(fake_url, width)
    page = seen.page
    run = fake_profile.store(fake_core.runs.folder)
    try:
        open_tab(page, "Profile")
        page.wait_for_function("document.querySelectorAll('#profile-bars .main-svg .barlayer .trace').length === 6")
        page.wait_for_function(
            "document.querySelectorAll('#profile-roofline .main-svg .scatterlayer .trace').length === 3"
        )
        assert page.locator("#profile-parts tbody tr").count() == 3
        assert page.locator("#profile-calls tbody tr").count() == 2
        links = page.locator("#profile-traces a")
        assert links.all_inner_texts()[0] == "FP32"
        with page.expect_download() as fetched:
            press(links.nth(1))
        assert fetched.value.suggested_filename == "tr-dq-w8a8.json.gz"
        assert json.loads(gzip.decompress(Path(fetched.value.path()).read_bytes())) == json.loads(fake_profile.TRACE)
        assert "--trace trace.json" in page.locator("#profile-command").inner_text()
        assert no_sideways_scrolling(page)
        picture(page, screenshots, "profile")
        seen.check()
    finally:
        shutil.rmtree(fake_core.runs.folder / "runs" / run)
