"""The whole job on pocket-video: choose it, compare, play, step, look at its layers, and find the run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from studio.services import prompts
from tests.browser.conftest import Visit
from tests.browser.pressing import choose, open_tab, press, push
from tests.browser.test_clips import TIMES, all_show, frame, watch_drift
from tests.browser.test_pages import picture
from tests.browser.test_whole_job import LONG, set_number
from trdq_core.models import ASSETS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ASSETS / "pocket-video" / "model_index.json").is_file(), reason="needs assets/pocket-video"
    ),
]
STEPS, PROMPTS = 2, 2  # few, since every machine that runs this shares its cores


def test_clips_are_compared_played_and_found_again(
    visit: Callable[..., Visit], real_url: str, screenshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CALIBRATION_PROMPTS", PROMPTS)
    seen = visit(real_url)
    page = seen.page
    choose(page, "#model", "pocket-video")
    page.wait_for_selector("#model-line >> text=16 frames")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'whale'")
    set_number(page, "groups", 1)
    set_number(page, "steps", STEPS)
    page.wait_for_selector("#plan >> text=No stored calibration fits")
    push(page, "#compare")
    page.wait_for_selector(".tr-strip-row img", timeout=LONG)
    page.wait_for_selector("#strip .tr-strip.done", timeout=LONG)
    page.wait_for_function(
        "[...document.querySelectorAll('.tr-clip video')].filter((v) => v.readyState > 2).length === 3"
    )
    assert all_show(page, 0)
    press(page.locator("[data-do=play]"))
    page.wait_for_function(f"({TIMES})().every((time) => time > 0.3)")
    first = page.evaluate(TIMES)
    watch_drift(page, 5)
    assert page.evaluate(TIMES) != first
    press(page.locator("[data-do=play]"))
    still = frame(page)
    assert all_show(page, still)
    press(page.locator("[data-do=back]" if still == 15 else "[data-do=forward]"))
    assert all_show(page, still - 1 if still == 15 else still + 1)
    assert "motion ratio" in page.locator(".tr-motion").inner_text()
    assert page.locator(".tr-column .tr-badge.int4").count() >= 2
    assert "Noise floor" in page.locator("#pages").inner_text()
    picture(page, screenshots, "real-6-clips")

    open_tab(page, "Activations")
    page.wait_for_selector("#facts .tr-facts", timeout=LONG)
    press(page.locator("#layer-part label", has_text="Temporal"))
    page.wait_for_selector("#histogram .gtitle >> text=temporal_blocks.0.attn1.to_q", timeout=LONG)
    assert page.locator("#layer input").input_value() == "blocks.0.attn1.to_q"
    picture(page, screenshots, "real-7-temporal")
    page.reload()
    page.wait_for_selector(".tr-clip >> nth=2")
    seen.check()
