"""Whole runs on a tiny Latte: clips in place of pictures, in the run folder and in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trdq_core import inspection, metrics, outputs, runs
from trdq_core.errors import BackendUnavailable, Cancelled
from trdq_core.execution import samples
from trdq_core.presets import parse_recipe
from trdq_core.similarity import Similarity
from trdq_core.specs import RunSpec, SharingSpec
from trdq_core.video_files import filmstrip, read_png_sequence

FRAMES, SIDE, STEPS = 4, 16, 2
PROMPTS = ("tiger", "green salad")  # of different lengths: Latte takes them one at a time
NAMES = ["fp", "fp-again", "rtn-w4a8", "tr-dq-w4a8"]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRDQ_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def spec_of(folder: Path, command: str = "compare", **changes: Any) -> RunSpec:
    settings: dict[str, Any] = {
        "command": command, "model": str(folder), "prompts": PROMPTS, "steps": STEPS, "timing_rounds": 1,
        "recipes": (parse_recipe("fp"), parse_recipe("rtn-w4a8"), parse_recipe("tr-dq-w4a8", groups=2)),
        "calibration_prompts": ("red apple", "face"),
    }  # fmt: skip
    return RunSpec(**{**settings, **changes})


class Done:
    """One comparison: its folder, its report, its events."""

    def __init__(self, tiny_video_folder: Path, folder: Path) -> None:
        self.folder, self.events = folder, []
        self.report = runs.run(spec_of(tiny_video_folder), folder, on_event=self.events.append)


@pytest.fixture(scope="module")
def done(tiny_video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tiny_video_folder, tmp_path_factory.mktemp("run"))


def test_clips_lie_where_the_report_says(done: Done) -> None:
    assert done.report["clip"] == {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": 8}
    assert list(done.report["recipes"]) == NAMES
    for name, row in done.report["recipes"].items():
        assert row["videos"] == [f"videos/{name}_{i:03d}.mp4" for i in range(2)]
        assert row["frames"] == [f"frames/{name}_{i:03d}" for i in range(2)]
        assert row["images"] == [f"images/{name}_{i:03d}.png" for i in range(2)]
        for video, frames, image in zip(row["videos"], row["frames"], row["images"], strict=True):
            assert (done.folder / video).stat().st_size > 500
            assert [file.name for file in sorted((done.folder / frames).iterdir())] == [
                f"{frame:03d}.png" for frame in range(FRAMES)
            ]
            clip = read_png_sequence(done.folder / frames)
            assert clip.shape == (FRAMES, SIDE, SIDE, 3)
            assert np.array_equal(np.asarray(Image.open(done.folder / image)), filmstrip(clip))


def test_metrics_are_those_of_the_exact_frames(done: Done) -> None:
    rows = done.report["recipes"]
    assert "frame_psnr" not in rows["fp"]
    for name in ("rtn-w4a8", "tr-dq-w4a8"):
        row, found = rows[name], []
        for own, other in zip(row["frames"], rows["fp"]["frames"], strict=True):
            found.append(metrics.compare_clips(*(read_png_sequence(done.folder / f) for f in (own, other))))
        assert row["frame_psnr"] == [one.psnr for one in found]
        assert row["frame_ssim"] == [one.ssim for one in found]
        assert row["temporal_error"] == [one.temporal_error for one in found]
        assert row["motion_ratio"] == [one.motion_ratio for one in found]
        assert row["worst_frame"] == [one.worst_frame for one in found]
        assert row["temporal_error_mean"] == pytest.approx(np.mean(row["temporal_error"]))
        assert row["motion_ratio_mean"] == pytest.approx(np.mean(row["motion_ratio"]))
        assert row["psnr"] == pytest.approx(np.mean(row["frame_psnr"]))
        assert row["ssim"] == pytest.approx(np.mean(row["frame_ssim"]))
        assert 0 < row["temporal_error_mean"] < 50


def test_the_reference_again_is_identical(done: Done) -> None:
    floor = done.report["recipes"]["fp-again"]
    assert floor["identical"] and floor["psnr"] is None and floor["ssim"] == 1
    assert floor["frame_psnr"] == [[None] * FRAMES] * 2 and floor["worst_frame"] == [None, None]
    assert floor["temporal_error"] == [0, 0] and floor["motion_ratio"] == [1, 1]


def test_events_tell_of_clips(done: Done) -> None:
    found = [event for event in done.events if event["kind"] == "clip"]
    assert [(event["recipe"], event["prompt"]) for event in found] == [(name, i) for name in NAMES for i in range(2)]
    for event in found:
        assert all((done.folder / event[key]).exists() for key in ("video", "frames", "image"))
    previews = [event for event in done.events if event["kind"] == "preview"]
    assert {event["recipe"] for event in previews} == {"fp", "rtn-w4a8", "tr-dq-w4a8"}
    shown = Image.open(done.folder / previews[0]["image"])
    assert shown.size == (FRAMES * (SIDE + 2) - 2, SIDE)
    assert json.loads((done.folder / "report.json").read_text()) == done.report
    assert not [event for event in done.events if event["kind"] in ("image", "warning")]


def test_rows_hold_times_kernels_and_bytes_as_for_pictures(done: Done) -> None:
    row = done.report["recipes"]["tr-dq-w4a8"]
    assert sum(row["kernels"].values()) == 2 * 10 + 2 * 6  # spatial blocks, and temporal ones
    assert row["step_ms"]["n"] == 1 and row["end_to_end_ms"]["n"] == 2
    assert row["weight_bytes"] < 0.3 * row["fp_weight_bytes"] and row["simulated"] is False
    assert len(row["latent_sqnr_db"]) == STEPS


def test_without_a_codec_the_run_goes_on(
    tiny_video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: object) -> Path:
        raise BackendUnavailable(
            "video: no ffmpeg was found to write libx264 with; pip install imageio-ffmpeg brings one."
        )

    monkeypatch.setattr(outputs, "write_mp4", missing)
    events: list[dict[str, Any]] = []
    report = runs.run(spec_of(tiny_video_folder, "sample", recipes=()), tmp_path, on_event=events.append)
    row = report["recipes"]["fp"]
    assert row["videos"] == [None, None]
    assert all((tmp_path / frames / "003.png").exists() for frames in row["frames"])
    (warning,) = [event["text"] for event in events if event["kind"] == "warning"]
    assert warning.startswith("video: no ffmpeg") and warning.endswith("the run goes on without mp4 files.")
    assert warning.count(".") == 1, "one sentence"
    assert [event["video"] for event in events if event["kind"] == "clip"] == [None, None]


def test_a_cancelled_run_leaves_its_filmstrip(
    tiny_video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(samples, "CLIP_PREVIEW_EVERY", 1)
    with pytest.raises(Cancelled):
        runs.run(
            spec_of(tiny_video_folder, "sample", recipes=(), steps=4), tmp_path, on_event=events.append,
            cancelled=lambda: sum(event["kind"] == "preview" for event in events) == 2,
        )  # fmt: skip
    last = [event for event in events if event["kind"] == "preview"][-1]
    assert (last["step"], last["steps"]) == (2, 4)
    assert Image.open(tmp_path / last["image"]).size == (FRAMES * (SIDE + 2) - 2, SIDE)
    assert events[-1]["kind"] == "cancelled"
    assert not list((tmp_path / "images").iterdir())


def test_calibrate_and_profile_take_clips(tiny_video_folder: Path, tmp_path: Path) -> None:
    report = runs.run(spec_of(tiny_video_folder, "profile", recipes=(parse_recipe("rtn-w8a8"),)), tmp_path)
    assert report["calibration"]["prompts"] == 2 and report["clip"]["frames"] == FRAMES
    assert report["recipes"]["rtn-w8a8"]["step_ms"]["n"] == 1


def test_attention_is_measured_and_planned_on_clips(tiny_video_folder: Path, tmp_path: Path) -> None:
    wish = SharingSpec(target_psnr_db=12.0)
    report = runs.run(spec_of(tiny_video_folder, "attention", recipes=(), sharing=wish), tmp_path)
    assert len(report["similarity"]["block_error"]) == 2, "spatial blocks only"
    found = Similarity.load(tmp_path).temporal
    assert found is not None
    assert report["similarity"]["temporal"]["block_error"] == found.block_error.mean(0).tolist()
    assert report["similarity"]["plan"]["blocks"] == [[0, 1]]
    assert report["similarity"]["plan"]["measured_prompts"] == 2


def test_space_and_time_are_inspected_apart(tiny_video_folder: Path, done: Done) -> None:
    (info,) = runs.list_calibrations(tiny_video_folder.name)
    names = inspection.layers(info.folder)
    recipe = parse_recipe("tr-dq-w4a8", groups=2)
    for layer in ("transformer_blocks.1.ff.net.2", "temporal_transformer_blocks.1.ff.net.2"):
        assert layer in names
        view = inspection.histograms(info.folder, str(tiny_video_folder), recipe, layer, 1)
        assert view.before.sum() == view.after.sum() == view.rows * 512
        assert inspection.channel_timeline(info.folder, layer).absmax.shape == (STEPS, 512)


@pytest.mark.slow
def test_the_pocket_model_makes_clips_in_little_memory(tmp_path: Path) -> None:
    spec = RunSpec(
        command="sample", model="pocket-video", recipes=(parse_recipe("tr-dq-w4a8"),), prompts=("frog",), steps=2,
        calibration_prompts=("fox",),
    )  # fmt: skip
    report = runs.run(spec, tmp_path)
    row = report["recipes"]["tr-dq-w4a8"]
    assert report["clip"] == {"frames": 16, "height": 64, "width": 64, "fps": 8}
    assert read_png_sequence(tmp_path / row["frames"][0]).shape == (16, 64, 64, 3)
    assert row["peak_rss_bytes"] < 3 * 2**30
