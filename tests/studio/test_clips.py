"""Clips of stored runs: sheets and archives of the exact frames, curves, what a stop leaves, and the page made of them."""

from __future__ import annotations

import dataclasses
import html as entities
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from studio.components import clips as component
from studio.components import controls as sidebar
from studio.components import curves, html
from studio.components.curves import Curve
from studio.context import Studio
from studio.pages import compare
from studio.services import clips
from studio.services.form import Form, compare_spec
from studio.services.stored import StoredRun
from studio.services.work import run_work
from tests.studio import fake_clips
from tests.studio.fake_core import FakeCore
from tests.studio.test_pages import values, visitor

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def moving() -> Form:
    """Controls that ask for clips."""
    return Form(model="pocket-video", prompt="whale", steps=2, groups=2)


@pytest.fixture
def run(studio: Studio, moving: Form) -> StoredRun:
    """A finished comparison of clips."""
    folder = run_work(studio.core, compare_spec(moving))(lambda event: None, lambda: False)
    found = studio.runs.open(folder.name)
    assert found is not None
    return found


def publish(path: Path) -> str:
    return f"file={path.name}"


def damaged(run: StoredRun, **changes: Any) -> StoredRun:
    """The run with other values in TR-DQ's row."""
    rows = run.report["recipes"] | {"tr-dq-w4a8": run.report["recipes"]["tr-dq-w4a8"] | changes}
    return dataclasses.replace(run, report=run.report | {"recipes": rows})


def test_a_sheet_holds_every_exact_frame(run: StoredRun) -> None:
    found = clips.clips_of(run, 0)
    assert [clip.recipe for clip in found] == ["fp", "rtn-w4a8", "tr-dq-w4a8"]
    frames, side = fake_clips.frames("rtn-w4a8"), fake_clips.SIDE
    sheet = np.asarray(Image.open(found[1].sheet))
    assert sheet.shape == (2 * side, clips.SHEET_COLUMNS * side, 3)
    for index in (0, 7, 8, 15):
        top, left = index // clips.SHEET_COLUMNS * side, index % clips.SHEET_COLUMNS * side
        assert np.array_equal(sheet[top : top + side, left : left + side], frames[index])
    with zipfile.ZipFile(found[1].archive) as bundle:
        assert bundle.namelist() == [f"rtn-w4a8_000/{index:03d}.png" for index in range(fake_clips.FRAMES)]
    assert found[0].psnr is None, "the reference has no curve"
    assert found[1].worst_frame == 5
    assert clips.clips_of(run, 1) == [], "there is one prompt"


def test_what_is_damaged_is_left_out_and_nothing_leads_out_of_the_run(run: StoredRun, tmp_path: Path) -> None:
    def names(changed: StoredRun) -> list[str]:
        return [clip.recipe for clip in clips.clips_of(changed, 0)]

    others = ["fp", "rtn-w4a8"]
    assert names(damaged(run, frames=["../../elsewhere"])) == others
    assert names(damaged(run, frames=[None])) == names(damaged(run, frames=7)) == others
    strange = damaged(run, frame_psnr=[[1.0]], worst_frame=[99], temporal_error=["x"], videos=["../../secret.mp4"])
    clip = clips.clips_of(strange, 0)[2]
    assert (clip.psnr, clip.worst_frame, clip.temporal_error, clip.video) == (None, None, None, None)
    for report in ({"clip": None}, {"clip": {"frames": 0, "height": 1, "width": 1, "fps": 8}}, {"clip": "x"}):
        assert clips.shape_of(dataclasses.replace(run, report=run.report | report)) is None
    (run.folder / "frames" / "fp_000" / "003.png").write_bytes(b"no picture")
    (run.folder / "frames" / "rtn-w4a8_000" / "003.png").unlink()
    moved = dataclasses.replace(run, id="another")  # nothing is stored under this id yet
    assert names(moved) == ["tr-dq-w4a8"]


def test_psnr_of_a_pair_is_that_of_its_frames(run: StoredRun) -> None:
    own, reference = (fake_clips.frames(name).astype(float) for name in ("tr-dq-w4a8", "fp"))
    each = [10 * math.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(own, reference, strict=True)]
    assert clips.psnr_of_pair(run, "fp", "tr-dq-w4a8", 0) == pytest.approx(np.mean(each))
    assert clips.psnr_of_pair(run, "fp", "fp", 0) == math.inf
    assert clips.psnr_of_pair(run, "fp", "missing", 0) is None


def test_a_player_holds_the_numbers_and_every_file(run: StoredRun) -> None:
    page = component.player(run, 0, publish)
    written = re.search(r'data-clips="([^"]*)"', page)
    assert written is not None
    data = json.loads(entities.unescape(written[1]))
    assert {name: data[name] for name in ("frames", "width", "height", "fps", "columns")} == {
        "frames": 16, "width": 64, "height": 64, "fps": 8.0, "columns": 8,
    }  # fmt: skip
    assert [clip["title"] for clip in data["clips"]] == ["FP32", "RTN W4A8", "TR-DQ W4A8"]
    assert len(data["clips"][1]["psnr"]) == 16 and data["clips"][0]["psnr"] is None
    for said in (
        "3.25 levels",
        "1.125",
        "frame 5",
        component.TEMPORAL_ERROR,
        "file=fp_000.mp4",
        "file=rtn-w4a8_000.zip",
    ):
        assert said in page
    assert page.count("<video") == 3 and page.count('class="tr-curve-field"') == 2
    gone = {name: facts | {"frames": ["frames/none"]} for name, facts in run.recipes.items()}
    assert component.GONE in component.player(with_rows(run, gone), 0, publish)
    timed = {name: {"kind": facts["kind"], "step_ms": facts["step_ms"]} for name, facts in run.recipes.items()}
    assert component.player(with_rows(run, timed), 0, publish) == "", "a timing has no clips"
    assert "Look closer" not in component.player(with_rows(run, {"fp": run.recipes["fp"]}), 0, publish), (
        "one clip has nothing to be compared with"
    )


def with_rows(run: StoredRun, rows: dict[str, Any]) -> StoredRun:
    return dataclasses.replace(run, report=run.report | {"recipes": rows})


def test_foreign_text_is_escaped(run: StoredRun) -> None:
    evil = dataclasses.replace(run, report=run.report | {"prompts": [EVIL], "reference": {"label": EVIL}})
    evil.report["recipes"]["fp"]["label"] = EVIL
    (run.folder / "events.jsonl").write_text(json.dumps({"kind": "warning", "text": f"no mp4 {EVIL}"}))
    page = component.player(damaged(evil, videos=[None]), 0, publish)
    assert "<img src=x" not in page and "&lt;img" in page


def test_a_missing_codec_is_told_in_the_words_of_the_run(studio: Studio, core: FakeCore, moving: Form) -> None:
    core.runs.codec = False
    folder = run_work(core, compare_spec(moving))(lambda event: None, lambda: False)
    run = studio.runs.open(folder.name)
    assert run is not None
    page = component.player(run, 0, publish)
    assert "no ffmpeg was found" in page and "the exact PNG frames are played instead" in page
    assert ".mp4" not in page
    (folder / "events.jsonl").unlink()
    assert clips.why_no_video(run) == clips.NO_VIDEO


def test_a_stopped_run_keeps_its_filmstrips(studio: Studio, core: FakeCore, moving: Form) -> None:
    core.runs.pace = 0.02
    with gr.Blocks():
        page = compare.build(*compare.build_strip(), gr.BrowserState(None))
    session = compare._Session(studio, page)
    handler = session.compare(visitor(), *values(dataclasses.replace(moving, steps=12)))
    while "RTN W4A8" not in str(next(handler).get(page.result.clips)):
        pass
    session.cancel(visitor())
    last = list(handler)[-1]
    shown = last[page.result.clips]
    assert "is kept" in last[page.strip]
    assert "stopped after step" in shown and "RTN W4A8" in shown
    assert 'data-clips="' in shown, "what was finished can be played"
    run = studio.runs.open(studio.runs.rows()[0].id)
    assert run is not None
    assert [left.recipe for left in clips.partials(run)] == ["rtn-w4a8"]


def test_a_comparison_of_clips_fills_the_player(studio: Studio, moving: Form) -> None:
    with gr.Blocks():
        page = compare.build(*compare.build_strip(), gr.BrowserState(None))
    last = list(compare._Session(studio, page).compare(visitor(), *values(moving)))[-1]
    view = page.result
    assert 'data-clips="' in last[view.clips]
    assert not last[view.pictures].visible, "wipe and difference of pictures make way"
    assert not any(last[column.image].visible for column in view.columns)
    assert "Temporal error" in last[view.columns[2].cards] and "3.25 levels" in last[view.columns[2].cards]


def test_a_picture_run_has_no_player(studio: Studio, form: Form) -> None:
    folder = run_work(studio.core, compare_spec(dataclasses.replace(form, steps=4)))(lambda event: None, lambda: False)
    run = studio.runs.open(folder.name)
    assert run is not None
    assert not clips.makes_clips(run) and clips.partials(run) == []
    assert "temporal error" not in html.metrics_table([("fp", run.recipes["fp"])], None)


def test_the_sidebar_follows_the_model() -> None:
    with gr.Blocks():
        controls = sidebar.build([("pocket-image", "pocket-image"), ("pocket-video", "pocket-video")])
    video = sidebar.of_model(controls, "pocket-video", "video", "watermelon")
    assert video[controls.prompt]["value"] == "whale"
    assert ["turtle"] in video[controls.examples]["samples"]
    timed = sidebar.of_model(controls, "random-dit", "speed", "whale")
    hidden = (controls.prompt, controls.examples, controls.extra_prompts)
    assert not any(timed[part]["visible"] for part in hidden), "random weights draw nothing"
    assert all(video[part]["visible"] for part in hidden)


def test_ticks_are_round_and_hold_every_value() -> None:
    assert curves.nice_ticks(17.3, 24.9) == [16.0, 18.0, 20.0, 22.0, 24.0, 26.0]
    for low, high in ((0.0, 0.0), (0.91, 0.9991), (-3.0, 250.0), (30.0, 30.0)):
        ticks = curves.nice_ticks(low, high)
        assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 7


def test_a_frame_without_a_value_interrupts_the_line() -> None:
    drawn = curves.panel("x", "PSNR", [Curve("a", "#123456", [20.0, None, 22.0, 21.0], 0)], 1)
    path = re.search(r'<path d="([^"]*)"', drawn)
    assert path is not None and path[1].count("M") == 2
    assert drawn.count("tr-curve-worst") == 1
    equal = curves.panel("x", "PSNR", [Curve("a", "#123456", [None, None], None)], 1)
    assert curves.EQUAL in equal and "<svg" not in equal
