"""An evaluation of clips: one at a time, means over frames, flicker and motion beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from trdq_core import metrics, perceptual, runs, terminal
from trdq_core.adapters.latte import LatteModel
from trdq_core.evaluation import tables
from trdq_core.evaluation.scores import CLIP_SAMPLE_COLUMNS, SAMPLE_COLUMNS
from trdq_core.presets import parse_recipe
from trdq_core.specs import RunSpec
from trdq_core.video_files import read_png_sequence

PROMPTS = ("tiger", "green salad")
NAMES = ["fp", "fp-again", "rtn-w4a8", "rtn-w3a4"]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRDQ_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def spec_of(folder: Path, **changes: Any) -> RunSpec:
    settings: dict[str, Any] = {
        "command": "evaluate", "model": str(folder), "prompts": PROMPTS, "seeds": 2, "steps": 2,
        "recipes": tuple(parse_recipe(name) for name in ("rtn-w4a8", "rtn-w3a4")),
        "calibration_prompts": ("red apple",),
    }  # fmt: skip
    return RunSpec(**{**settings, **changes})


@pytest.fixture(scope="module")
def done(tiny_video_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    runs.run(spec_of(tiny_video_folder), folder)
    return folder


def test_rows_are_means_over_the_frames_of_each_clip(done: Path, tiny_video_folder: Path) -> None:
    report = json.loads((done / "evaluation.json").read_text())
    rows = report["recipes"]
    assert list(rows) == NAMES
    assert (report["evaluation"]["pictures"], report["evaluation"]["batch"]) == (4, 1)
    assert report["clip"] == {"frames": 4, "height": 16, "width": 16, "fps": 8}
    row, model = rows["rtn-w4a8"], LatteModel(tiny_video_folder)
    assert row["frames"] == ["frames/rtn-w4a8_000", "frames/rtn-w4a8_001"] and row["videos"][1].endswith("_001.mp4")
    samples = list(csv.DictReader((done / "samples" / "rtn-w4a8.csv").open()))
    assert tuple(samples[0]) == (*SAMPLE_COLUMNS, *CLIP_SAMPLE_COLUMNS)
    for index, sample in enumerate(samples[:2]):
        own, other = (read_png_sequence(done / rows[name]["frames"][index]) for name in ("rtn-w4a8", "fp"))
        stored = load_file(done / "reference" / f"batch_{index:03d}.safetensors")["pictures"].numpy()
        assert np.array_equal(stored[0], other)
        found = metrics.compare_clips(own, other)
        assert float(sample["psnr"]) == pytest.approx(np.mean(found.psnr), rel=1e-5)
        assert float(sample["temporal_error"]) == pytest.approx(found.temporal_error, rel=1e-5)
        assert float(sample["motion_ratio"]) == pytest.approx(found.motion_ratio, rel=1e-5)
        assert int(sample["worst_frame"]) == found.worst_frame
        seen = perceptual.feature_distance(model.encoder_features(own), model.encoder_features(other))
        assert float(sample["encoder_feature_distance"]) == pytest.approx(seen.mean(), rel=1e-4)
        assert float(sample["gmsd"]) == pytest.approx(perceptual.gmsd(own, other).mean(), rel=1e-5)
    assert row["temporal_error_mean"] == pytest.approx(np.mean([float(s["temporal_error"]) for s in samples]), rel=1e-5)
    assert row["temporal_error_se"] > 0 and row["motion_ratio_std"] > 0
    assert "temporal_error" not in row, "in a comparison that name holds a list"
    assert (rows["fp-again"]["temporal_error_mean"], rows["fp-again"]["motion_ratio_mean"]) == (0, 1)


def test_the_rows_are_those_of_a_comparison(done: Path, tiny_video_folder: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny_video_folder, command="compare", seeds=1, timing_rounds=1, recipes=(parse_recipe("rtn-w3a4"),))
    compared = runs.run(spec, tmp_path)["recipes"]["rtn-w3a4"]
    samples = list(csv.DictReader((done / "samples" / "rtn-w3a4.csv").open()))[:2]
    assert [float(s["temporal_error"]) for s in samples] == pytest.approx(compared["temporal_error"], rel=1e-4)
    assert np.mean([float(s["psnr"]) for s in samples]) == pytest.approx(compared["psnr"], rel=1e-4)


def test_tables_have_columns_for_flicker_and_motion(done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    rows = list(csv.DictReader((done / "evaluation.csv").open()))
    assert tuple(rows[0]) == (*tables.CSV_COLUMNS, *tables.CLIP_COLUMNS)
    assert float(rows[2]["temporal_error_mean"]) == report["recipes"]["rtn-w4a8"]["temporal_error_mean"]
    text, shown = (done / "evaluation.md").read_text(), terminal.report_text(report)
    for found in (text, shown):
        assert "temporal error" in found and "motion: mean squared frame difference" in found
    cells = dict(
        zip(tables.header(clips=True), tables.cells("x", report["recipes"]["rtn-w4a8"], clips=True), strict=True)
    )
    assert cells["temporal error"].startswith(f"{report['recipes']['rtn-w4a8']['temporal_error_mean']:.2f} ± ")
    assert cells["arithmetic"] in ("real", "simulated")


def test_a_stopped_evaluation_of_clips_goes_on(done: Path, tiny_video_folder: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    runs.run(spec_of(tiny_video_folder), done, on_event=events.append)
    assert not [event for event in events if event["kind"] in ("clip", "progress")], "everything was there already"


def test_layers_are_scanned_on_clips(tiny_video_folder: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny_video_folder, command="sensitivity", bits=("W4A8",), recipes=(parse_recipe("rtn-w4a8"),))
    report = runs.run(spec, tmp_path)
    roles = {layer["role"] for layer in report["sensitivity"]["layers"]}
    assert {"temporal_q", "self_q"} <= roles
    assert all(layer["cells"]["W4A8"]["denoiser_error"] > 0 for layer in report["sensitivity"]["layers"])
