"""A comparison of clips in a browser, over the fake core: every video under one transport, and what is drawn from the frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Visit
from tests.browser.test_pages import no_sideways_scrolling, open_sidebar, picture, press
from tests.studio.fake_core import FakeCore

pytestmark = pytest.mark.browser
Open = Callable[..., Visit]
TOGETHER = 0.05  # seconds

# Which of the exact frames each screen shows: the nearest one to what the video draws.
SHOWN = """async () => {
  const data = JSON.parse(document.querySelector('.tr-clips').dataset.clips), side = [data.width, data.height];
  const read = (source, x, y) => {
    const canvas = Object.assign(document.createElement('canvas'), {width: side[0], height: side[1]});
    const pen = canvas.getContext('2d', {willReadFrequently: true});
    pen.drawImage(source, x, y, ...side, 0, 0, ...side);
    return pen.getImageData(0, 0, ...side).data;
  };
  return Promise.all([...document.querySelectorAll('.tr-clip video')].map(async (video, index) => {
    const sheet = new Image();
    sheet.src = data.clips[index].sheet;
    await sheet.decode();
    const now = read(video, 0, 0);
    const errors = [...Array(data.frames).keys()].map((frame) => {
      const exact = read(sheet, frame % data.columns * side[0], Math.floor(frame / data.columns) * side[1]);
      return exact.reduce((sum, value, at) => sum + (value - now[at]) ** 2, 0);
    });
    return errors.indexOf(Math.min(...errors));
  }));
}"""
TIMES = "() => [...document.querySelectorAll('.tr-clip video')].map((video) => video.currentTime)"
COLOURS = """() => {
  const canvas = document.querySelector('.tr-difference canvas');
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const found = new Set();
  for (let at = 0; at < data.length; at += 4) found.add(data.slice(at, at + 4).join());
  return [...found];
}"""


@pytest.fixture(autouse=True)
def quick(fake_core: FakeCore) -> Iterator[None]:
    fake_core.runs.pace, fake_core.runs.codec = 0.005, True
    yield
    fake_core.runs.pace, fake_core.runs.codec = 0.01, True


def choose_video(page: Any, steps: int = 2) -> None:
    open_sidebar(page)
    page.locator("#model input").click()
    page.get_by_role("option", name="pocket-video", exact=True).click()
    page.wait_for_selector("#model-line >> text=16 frames")
    page.locator("#groups input[type=number]").fill("2")
    page.locator("#groups input[type=number]").press("Enter")
    field = page.locator("#steps input[type=number]")
    field.fill(str(steps))
    field.press("Enter")
    if page.viewport_size["width"] < 768:
        page.locator(".sidebar .toggle-button").click()
        page.wait_for_timeout(400)


def compare(page: Any, steps: int = 2) -> None:
    choose_video(page, steps)
    press(page, "compare")
    page.wait_for_selector("#strip .tr-strip.done >> text=It is kept under Runs")
    page.wait_for_function(
        "document.querySelectorAll('.tr-clip video').length === 3"
        " && [...document.querySelectorAll('.tr-clip video')].every((video) => video.readyState > 2)"
    )


def shown(page: Any) -> list[int]:
    """The frame of each video, once none of them is on its way to another."""
    page.wait_for_function("[...document.querySelectorAll('.tr-clip video')].every((video) => !video.seeking)")
    return list(page.evaluate(SHOWN))


def frame(page: Any) -> int:
    return int(page.locator("[data-do=seek]").input_value())


@pytest.mark.parametrize("width", [1400, 390])
def test_clips_play_together_and_step_by_frames(visit: Open, fake_url: str, screenshots: Path, width: int) -> None:
    seen = visit(fake_url, width)
    page = seen.page
    compare(page)
    assert no_sideways_scrolling(page)
    assert shown(page) == [0, 0, 0]
    picture(page, screenshots, "9-clips")

    page.locator("[data-do=play]").click()
    page.wait_for_function(f"({TIMES})().every((time) => time > 0.3)")
    before = page.evaluate(TIMES)
    for _ in range(8):
        page.wait_for_timeout(70)
        times = page.evaluate(TIMES)
        assert max(times) - min(times) < TOGETHER, times
    assert times != before
    assert page.locator("[data-do=play]").inner_text() == "Pause"
    page.locator("[data-do=play]").click()
    still = shown(page)
    assert still == [frame(page)] * 3
    page.wait_for_timeout(200)
    assert shown(page) == still, "paused"
    seen.check()
