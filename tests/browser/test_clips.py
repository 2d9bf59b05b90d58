"""A comparison of clips in a browser, over the fake core: every video under one transport, and what is drawn from the frames."""

from __future__ import annotations

import dataclasses
import statistics
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from studio.services.form import Form, compare_spec
from tests.browser.conftest import Visit
from tests.browser.pressing import choose, open_newest_run, open_tab, press, press_at, push
from tests.browser.test_pages import no_sideways_scrolling, open_sidebar, picture, start
from tests.studio.fake_clips import FRAMES
from tests.studio.fake_core import FakeCore
from tests.studio.fake_sharing import BLOCKS, TEMPORAL_BLOCKS
from trdq_core.presets import parse_recipe

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
    choose(page, "#model", "pocket-video")
    page.wait_for_selector("#model-line >> text=16 frames")
    page.locator("#groups input[type=number]").fill("2")
    page.locator("#groups input[type=number]").press("Enter")
    field = page.locator("#steps input[type=number]")
    field.fill(str(steps))
    field.press("Enter")
    if page.viewport_size["width"] < 768:
        press(page.locator(".sidebar .toggle-button"))
        page.wait_for_timeout(400)


def compare(page: Any, steps: int = 2) -> None:
    choose_video(page, steps)
    start(page, "compare")
    page.wait_for_selector("#strip .tr-strip.done >> text=It is kept under Runs")
    page.wait_for_function(
        "document.querySelectorAll('.tr-clip video').length === 3"
        " && [...document.querySelectorAll('.tr-clip video')].every((video) => video.readyState > 2)"
    )


def shown(page: Any) -> list[int]:
    """The frame of each video, once none of them is on its way to another."""
    page.wait_for_function("[...document.querySelectorAll('.tr-clip video')].every((video) => !video.seeking)")
    return list(page.evaluate(SHOWN))


def all_show(page: Any, number: int) -> bool:
    """Whether every video comes to show this frame and no other; a seek ends a little before the frame is painted."""
    for _ in range(20):
        if set(shown(page)) == {number} and frame(page) == number:
            return True
        page.wait_for_timeout(50)
    return False


def watch_drift(page: Any, looks: int) -> None:
    """Look a few times how far apart the videos are. The median counts: a machine that tests in two processes starves a
    decoder for a moment now and then, and the transport then brings it back.
    """
    apart = []
    for _ in range(looks):
        page.wait_for_timeout(70)
        times = page.evaluate(TIMES)
        apart.append(max(times) - min(times))
    print("drift in ms:", ", ".join(f"{1000 * seconds:.1f}" for seconds in apart))
    assert statistics.median(apart) < TOGETHER, apart


def frame(page: Any) -> int:
    return int(page.locator("[data-do=seek]").input_value())


@pytest.mark.parametrize("width", [1400, 390])
def test_clips_play_together_and_step_by_frames(visit: Open, fake_url: str, screenshots: Path, width: int) -> None:
    seen = visit(fake_url, width)
    page = seen.page
    compare(page)
    assert no_sideways_scrolling(page)
    assert all_show(page, 0)
    picture(page, screenshots, "9-clips")

    press(page.locator("[data-do=play]"))
    page.wait_for_function(f"({TIMES})().every((time) => time > 0.3)")
    before = page.evaluate(TIMES)
    watch_drift(page, 8)
    assert page.evaluate(TIMES) != before
    page.wait_for_function(f"({TIMES})().every((time) => time > 1.6)")
    page.wait_for_function(f"({TIMES})().every((time) => time > 0.1 && time < 0.8)")
    watch_drift(page, 4)
    assert page.locator("[data-do=play]").inner_text() == "Pause"
    press(page.locator("[data-do=play]"))
    still = frame(page)
    assert all_show(page, still)
    page.wait_for_timeout(200)
    assert all_show(page, still), "paused"
    seen.check()


def store(core: FakeCore, *recipes: str, prompts: int = 1) -> Path:
    """A finished run of clips that no page has seen yet."""
    form = Form(model="pocket-video", prompt="whale", steps=2, groups=2, extra_prompts=prompts - 1)
    spec = dataclasses.replace(compare_spec(form), recipes=tuple(parse_recipe(recipe) for recipe in recipes))
    folder = core.runs.new_run_folder("compare")
    core.runs.run(spec, folder)
    return folder


def show_newest(page: Any) -> None:
    open_tab(page, "Runs")
    open_newest_run(page)
    page.wait_for_selector("#run-metrics .tr-table")
    push(page, "#show-run")
    page.wait_for_selector(".tr-clips:visible")
    page.wait_for_function("document.querySelector('.tr-clip-frame').innerText.startsWith('frame 0')")


def test_steps_charts_wipe_and_difference_follow_the_exact_frames(
    visit: Open, fake_url: str, fake_core: FakeCore
) -> None:
    folder = store(fake_core, "fp", "rtn-w4a8", "tr-dq-w8a8", "tr-dq-w4a8", prompts=2)
    seen = visit(fake_url)
    page = seen.page
    show_newest(page)
    assert page.locator(".tr-clip").count() == 4, "a column for every recipe"
    press(page.locator("[data-do=forward]"))
    press(page.locator("[data-do=forward]"))
    assert all_show(page, 2)
    press(page.locator("[data-do=back]"))
    assert all_show(page, 1)
    page.locator(".tr-clip-columns").press("ArrowRight")
    assert all_show(page, 2)
    field = page.locator(".tr-curve-psnr .tr-curve-field")
    press_at(field, 11.5 / FRAMES, 0.5)
    assert all_show(page, 11)
    press(page.locator(".tr-motion [data-seek]").first)
    assert all_show(page, 5), "the worst frame, which the table names"
    assert (
        "frame 5" in page.locator(".tr-motion").inner_text()
        and "3.25 levels" in page.locator(".tr-motion").inner_text()
    )
    assert field.get_attribute("aria-valuetext").startswith("frame 5: RTN W4A8 ")

    assert len(page.evaluate(COLOURS)) > 50, "the reference and TR-DQ differ"
    page.locator("[data-do=right]").select_option("0")
    assert page.evaluate(COLOURS) == ["247,247,247,255"], "full precision against itself is one grey"
    page.locator("[data-do=right]").select_option("1")
    press(page.locator("input[name=tr-gain][value='16']"))
    page.wait_for_selector(".tr-difference >> text=16 of 255")
    wipe = page.locator(".tr-wipe")
    box = wipe.bounding_box()
    wipe.click(position={"x": box["width"] * 0.25, "y": box["height"] / 2})
    assert wipe.get_attribute("aria-valuenow") == "25"
    wipe.press("ArrowRight")
    assert wipe.get_attribute("aria-valuenow") == "27"

    with page.expect_download() as download:
        press(page.locator(".tr-clip a", has_text="frames").nth(1))
    with zipfile.ZipFile(download.value.path()) as bundle:
        assert bundle.namelist() == [f"rtn-w4a8_000/{number:03d}.png" for number in range(FRAMES)]
        assert bundle.read("rtn-w4a8_000/005.png") == (folder / "frames" / "rtn-w4a8_000" / "005.png").read_bytes()
    with page.expect_download() as download:
        press(page.locator(".tr-clip a", has_text="mp4").first)
    assert Path(download.value.path()).read_bytes() == (folder / "videos" / "fp_000.mp4").read_bytes()

    choose(page, "#clip-prompt", 1)
    page.wait_for_function("document.querySelector('.tr-clip a').download.startsWith('fp_001')")
    page.wait_for_function("document.querySelector('.tr-clip-frame').innerText.startsWith('frame 0')")
    assert all_show(page, 0)
    seen.check()


def test_without_a_codec_the_exact_frames_play(visit: Open, fake_url: str, fake_core: FakeCore) -> None:
    fake_core.runs.codec = False
    store(fake_core, "fp", "tr-dq-w4a8")
    seen = visit(fake_url)
    page = seen.page
    show_newest(page)
    assert "no ffmpeg was found" in page.locator(".tr-clip-note").inner_text()
    assert page.locator(".tr-clip video:visible").count() == 0
    assert page.locator(".tr-clip a", has_text="mp4").count() == 0
    press(page.locator("[data-do=play]"))
    page.wait_for_function("Number(document.querySelector('[data-do=seek]').value) > 2")
    press(page.locator("[data-do=play]"))
    reds = page.evaluate(
        """() => [...document.querySelectorAll('.tr-clip canvas')].map((canvas) => {
          const {data} = canvas.getContext('2d').getImageData(0, 32, 64, 1);
          return [...Array(64).keys()].find((x) => data[4 * x + 1] < 100);
        })"""
    )
    assert reds[0] is not None and abs(reds[0] - reds[1]) <= 1, "the disc is at one place in both"
    seen.check()


def test_a_cancelled_run_leaves_its_filmstrips(
    visit: Open, fake_url: str, fake_core: FakeCore, screenshots: Path
) -> None:
    fake_core.runs.pace = 0.3  # long enough for a busy machine to see the second recipe begin
    page = visit(fake_url).page
    choose_video(page, 6)
    assert page.locator("#prompt textarea").input_value() == "whale", "a prompt that the model knows"
    assert "turtle" in page.locator("#prompt-examples").inner_text()
    push(page, "#compare")
    page.wait_for_selector(".tr-strip-row >> nth=1")
    fake_core.runs.pace = 1.0
    push(page, "#cancel")
    page.wait_for_selector("#strip .tr-strip.cancelled")
    page.wait_for_selector(".tr-strip-row >> text=stopped after step")
    picture(page, screenshots, "10-clips-cancelled")
    assert page.evaluate(
        "[...document.querySelectorAll('.tr-strip-row img')].every((image) => image.naturalWidth > 100)"
    )
    open_tab(page, "Runs")
    open_newest_run(page)
    page.wait_for_selector("#run-strips >> text=stopped after step")
    page.wait_for_function(
        "document.querySelectorAll('#run-strips img').length === 2"
        " && [...document.querySelectorAll('#run-strips img')].every((image) => image.naturalWidth > 100)"
    )
    picture(page, screenshots, "13-clips-runs")


def test_the_other_pages_know_a_video_model(visit: Open, fake_url: str, screenshots: Path) -> None:
    seen = visit(fake_url)
    page = seen.page
    choose_video(page)
    open_tab(page, "Guidance")
    push(page, "#measure-attention")
    page.wait_for_selector("#strip .tr-strip.done >> text=can be chosen again")
    page.wait_for_selector("#blocks-map .tr-map-field")
    page.wait_for_selector("#sharing-plan .tr-cards")
    page.wait_for_timeout(1500)  # gradio says the last answer of a job twice, the second time as its stream ends
    rows = "n => JSON.parse(document.querySelector('#blocks-map .tr-map-field').dataset.map).v.length === n"
    page.wait_for_function(rows, arg=BLOCKS)
    threshold = page.locator("#threshold input[type=number]").input_value()
    press(page.locator("#guidance-part label", has_text="Temporal"))
    page.wait_for_selector("#guidance-note >> text=only looked at")
    page.wait_for_function(rows, arg=TEMPORAL_BLOCKS)
    page.wait_for_function(
        "n => document.querySelectorAll('#temporal .main-svg .scatterlayer .trace').length === n", arg=TEMPORAL_BLOCKS
    )
    for hidden in ("#threshold", "#published", "#sharing-plan", "#apply-plan", "#try"):
        page.locator(hidden).wait_for(state="hidden")
    press_at(page.locator("#blocks-map .tr-map-field"), 0.1, 3.5 / TEMPORAL_BLOCKS)
    page.wait_for_selector("#heads-map >> text=Heads of block 3")
    picture(page, screenshots, "14-clips-guidance-temporal")
    press(page.locator("#guidance-part label", has_text="Spatial"))
    page.wait_for_function(rows, arg=BLOCKS)
    assert page.locator("#threshold input[type=number]").input_value() == threshold
    push(page, "#try")
    page.wait_for_selector("#trial-numbers >> text=mean over the frames of one clip")
    picture(page, screenshots, "11-clips-guidance")
    open_tab(page, "Layers")
    page.wait_for_selector("#edit-totals .tr-cards")
    push(page, "#run-scan")
    page.wait_for_function("document.querySelectorAll('#scan-chart .main-svg .barlayer .trace').length > 1")
    picture(page, screenshots, "12-clips-layers")
    assert no_sideways_scrolling(page)
    seen.check()

    narrow = visit(fake_url, 390)
    choose_video(narrow.page)
    open_tab(narrow.page, "Guidance")
    press(narrow.page.locator("#guidance-part label", has_text="Temporal"))
    narrow.page.wait_for_selector("#guidance-note >> text=only looked at")
    narrow.page.wait_for_function(rows, arg=TEMPORAL_BLOCKS)
    assert no_sideways_scrolling(narrow.page)
    picture(narrow.page, screenshots, "14-clips-guidance-temporal")
    narrow.check()
