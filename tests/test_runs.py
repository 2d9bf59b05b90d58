"""Whole runs on a tiny stock model: reports, events, reuse, cancelling, bad input, inspection."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trdq_core import inspection, listings, runs
from trdq_core.errors import CalibrationError, Cancelled, ModelError, RecipeError, ShapeError, StorageError
from trdq_core.presets import make_recipe, with_sharing
from trdq_core.specs import Recipe, RunSpec, SharingSpec

STEPS = 4
TR_DQ = make_recipe("tr-dq", weight_bits=4, activation_bits=8, groups=2)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRDQ_DATA_DIR", str(tmp_path))
    return tmp_path


def spec_of(tiny_folder: Path, command: str = "compare", **changes: Any) -> RunSpec:
    settings: dict[str, Any] = {
        "command": command,
        "model": str(tiny_folder),
        "recipes": (make_recipe("fp"), make_recipe("rtn", weight_bits=4, activation_bits=8), TR_DQ),
        "prompts": ("tiger face", "rocket"),
        "calibration_prompts": ("red apple",),
        "steps": STEPS,
        "timing_rounds": 2,
    }
    return RunSpec(**{**settings, **changes})


def test_compare_reports_everything_it_promises(tiny_folder: Path, data: Path) -> None:
    spec, folder, events = spec_of(tiny_folder), runs.new_run_folder("compare"), []
    report = runs.run(spec, folder, on_event=events.append)
    assert json.loads((folder / "report.json").read_text()) == report
    assert RunSpec.from_json((folder / "spec.json").read_text()) == spec
    assert [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()] == events
    assert list(report["recipes"]) == ["fp", "fp-again", "rtn-w4a8", "tr-dq-w4a8"]
    floor = report["recipes"]["fp-again"]
    assert floor["identical"]
    assert floor["psnr"] is None
    assert floor["step_ms"]["n"] == 2
    assert floor["step_ms"] != report["recipes"]["fp"]["step_ms"], "the noise floor's time is a measurement of its own"
    for name in ("rtn-w4a8", "tr-dq-w4a8"):
        row = report["recipes"][name]
        assert len(row["latent_sqnr_db"]) == STEPS
        assert row["n"] == 2
        assert row["psnr"] > 15
        assert 0 < row["ssim"] < 1
        assert row["step_ms"]["n"] == 2
        assert row["end_to_end_ms"]["n"] == 2
        assert row["weight_bytes"] < 0.3 * row["fp_weight_bytes"]
        assert row["peak_rss_bytes"] > 50 * 2**20
        assert sum(row["kernels"].values()) == 20
        assert row["simulated"] is False
        for image in row["images"]:
            assert np.asarray(Image.open(folder / image)).shape == (16, 16, 3)
    kinds = {event["kind"] for event in events}
    assert kinds == {"stage", "progress", "preview", "image", "result", "done"}
    assert all((folder / event["image"]).exists() for event in events if event["kind"] == "preview")
    assert runs.list_runs()[0].state == "done"


def test_a_stored_calibration_serves_other_recipes(tiny_folder: Path, data: Path) -> None:
    calibrate = spec_of(tiny_folder, "calibrate", recipes=(TR_DQ,))
    assert runs.find_calibration(calibrate) is None
    first = runs.run(calibrate, runs.new_run_folder("calibrate"))
    assert not first["calibration"]["reused"]
    assert runs.find_calibration(calibrate).fingerprint == first["calibration"]["fingerprint"]
    other = spec_of(tiny_folder, "sample", recipes=(make_recipe("smoothquant"),))
    second = runs.run(other, runs.new_run_folder("sample"))
    assert second["calibration"]["reused"]
    assert second["recipes"]["smoothquant-w8a8"]["images"]
    assert runs.find_calibration(spec_of(tiny_folder, seed=1)) is None
    (info,) = runs.list_calibrations()
    assert info.prompts == 1


def test_a_damaged_calibration_is_made_again_with_a_word(tiny_folder: Path, data: Path) -> None:
    spec, events = spec_of(tiny_folder, "calibrate", recipes=()), []
    runs.run(spec, runs.new_run_folder("calibrate"))
    (info,) = runs.list_calibrations()
    (info.folder / "statistics.safetensors").write_bytes(b"x")
    report = runs.run(spec, runs.new_run_folder("calibrate"), on_event=events.append)
    assert not report["calibration"]["reused"]
    assert any(event["kind"] == "warning" and "damaged" in event["text"] for event in events)


def test_cancelling_keeps_what_was_finished(tiny_folder: Path, data: Path) -> None:
    folder, events = runs.new_run_folder("compare"), []

    def third_picture_done() -> bool:
        return sum(event["kind"] == "image" for event in events) >= 3

    with pytest.raises(Cancelled, match="Cancelled during sample; what was finished before is kept"):
        runs.run(spec_of(tiny_folder), folder, on_event=events.append, cancelled=third_picture_done)
    assert (folder / "images" / "fp_001.png").exists()
    assert "fp" in json.loads((folder / "report.json").read_text())["recipes"]
    assert events[-1]["kind"] == "cancelled"
    assert runs.list_runs()[0].state == "cancelled"
    after = [event["kind"] for event in events[max(i for i, e in enumerate(events) if e["kind"] == "image") :]]
    assert after.count("progress") <= 2


@pytest.mark.parametrize("command", ["calibrate", "sample", "compare", "profile", "save"])
def test_what_a_layer_cannot_take_is_said_before_anything_is_sampled(
    command: str, tiny_folder: Path, data: Path
) -> None:
    events: list[dict[str, Any]] = []
    spec = spec_of(tiny_folder, command, recipes=(odd_groups(),))
    with pytest.raises(ShapeError, match=r"transformer_blocks\.0\.attn1\.to_q: weight group_size=96 does not divide"):
        runs.run(spec, runs.new_run_folder(command), on_event=events.append)
    assert [event["kind"] for event in events] == ["stage", "failed"], "the model was loaded, nothing was sampled"
    assert runs.list_calibrations() == []


def odd_groups() -> Recipe:
    """A recipe with groups of 96 channels, which no layer of the tiny model can be cut into."""
    recipe = make_recipe("q-dit", weight_bits=4, activation_bits=4)
    odd = {
        name: dataclasses.replace(getattr(recipe.rules[0], name), group_size=96) for name in ("weight", "activation")
    }
    return dataclasses.replace(recipe, rules=(dataclasses.replace(recipe.rules[0], **odd),))


def test_profile_needs_no_pictures(data: Path) -> None:
    spec = RunSpec(
        command="profile", model="random-dit", recipes=(make_recipe("rtn"),), calibration_prompts=("any",),
        steps=2, timing_rounds=1,
    )  # fmt: skip
    folder = runs.new_run_folder("profile")
    report = runs.run(spec, folder)
    row = report["recipes"]["rtn-w8a8"]
    for one in report["recipes"].values():
        assert json.loads(gzip.decompress((folder / one["trace_file"]).read_bytes()))["traceEvents"]
    assert row["weight_bytes"] <= 0.30 * row["fp_weight_bytes"]
    assert row["step_ms"]["median"] > 0
    with pytest.raises(ModelError, match="its weights are random and make no pictures"):
        runs.run(RunSpec(command="sample", model="random-dit", prompts=("x",), steps=2), runs.new_run_folder("sample"))


def test_unknown_models_and_full_disks_are_one_sentence(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="model: got 'nothing'; known models are pocket-image, pocket-video, random"):
        runs.run(spec_of(Path("nothing")), runs.new_run_folder("compare"))
    assert runs.list_runs()[0].state == "failed"
    (data / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written .* free some disk space or choose another folder"):
        runs.run(spec_of(tiny_folder), data / "file" / "run")

    def full(self: Image.Image, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    folder = runs.new_run_folder("compare")
    with pytest.raises(StorageError, match=r"could not be written \(No space left on device\)"):
        runs.run(spec_of(tiny_folder), folder)
    assert (folder / "spec.json").exists()
    assert (folder / "report.json").exists()


def test_inspection_shows_a_layer_before_and_after(tiny_folder: Path, data: Path) -> None:
    runs.run(spec_of(tiny_folder, "calibrate", recipes=()), runs.new_run_folder("calibrate"))
    (info,) = runs.list_calibrations()
    names = inspection.layers(info.folder)
    layer = "transformer_blocks.1.ff.net.2"
    assert layer in names
    view = inspection.histograms(info.folder, str(tiny_folder), TR_DQ, layer, 1)
    assert view.before.sum() == view.after.sum() == view.rows * 512
    assert len(view.edges) == len(view.before) + 1
    assert view.before_facts.absmax > 0
    assert "dB on held-out rows" in view.note
    plain = inspection.histograms(info.folder, str(tiny_folder), make_recipe("rtn"), layer, 0)
    assert np.array_equal(plain.before, plain.after)
    timeline = inspection.channel_timeline(info.folder, layer)
    assert (np.diff(timeline.timesteps) > 0).all()
    assert timeline.absmax.shape == (STEPS, 512)
    assert inspection.group_labels(TR_DQ, timeline.timesteps) == ["0 to 500", "500 to 1000"]
    assert inspection.group_edges(TR_DQ, timeline.timesteps) == [500.0]
    with pytest.raises(CalibrationError, match="time group: got 7; this recipe has groups 0 to 1"):
        inspection.histograms(info.folder, str(tiny_folder), TR_DQ, layer, 7)
    assert math.isfinite(view.after_facts.sqnr_db)
    fitted = make_recipe("tr-dq", groups=2, group_kind="dp")
    (edge,) = inspection.group_edges(fitted, timeline.timesteps, info.folder)
    assert timeline.timesteps[0] < edge < timeline.timesteps[-1], "cut where the ranges say"
    found = inspection.look(str(tiny_folder), TR_DQ, layer=layer, group=1, calibration=info.fingerprint[:6])
    assert found["before"] == view.before.tolist() and found["groups"] == ["0 to 500", "500 to 1000"]
    assert json.loads(json.dumps(found))["after_facts"]["sqnr_db"] == view.after_facts.sqnr_db
    assert "absmax over RMS" in listings.activations_text(found) and layer in listings.activations_text(found)
    with pytest.raises(CalibrationError, match="there is no stored calibration nowhere; run the calibrate command"):
        inspection.look(str(tiny_folder), TR_DQ, calibration="nowhere")
    with pytest.raises(CalibrationError, match="layer: got 'x'; observed were"):
        inspection.look(str(tiny_folder), TR_DQ, layer="x")
    assert str(runs.list_runs()[0].folder) in listings.runs_text(runs.list_runs())
    assert listings.runs_text([]) == "No runs yet."


def test_a_comparison_survives_a_disk_that_cannot_store_its_calibration(
    tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (data / "calibrations").write_text("a file where the folder should be")
    folder, events = tmp_path_factory.mktemp("elsewhere") / "run", []
    report = runs.run(spec_of(tiny_folder, recipes=(make_recipe("rtn"),)), folder, on_event=events.append)
    assert "rtn-w8a8" in report["recipes"]
    assert any(event["kind"] == "warning" and "goes on without storing" in event["text"] for event in events)
    with pytest.raises(StorageError, match="calibration: could not write"):
        runs.run(spec_of(tiny_folder, "calibrate"), folder)


def test_a_simulated_recipe_shows_quality_and_no_times(tiny_folder: Path, data: Path) -> None:
    spec = spec_of(tiny_folder, recipes=(make_recipe("rtn"),), prompts=("rocket",), backend="reference")
    row = runs.run(spec, runs.new_run_folder("compare"))["recipes"]["rtn-w8a8"]
    assert row["simulated"]
    assert row["step_ms"] is None
    assert row["end_to_end_ms"] is None
    assert row["psnr"] > 15
    assert list(row["kernels"]) == ["reference float64"]
    assert all(layer.simulated for layer in runs.plan(str(tiny_folder), make_recipe("rtn"), backend="reference").layers
               if layer.action == "quantize")  # fmt: skip


def test_attention_is_measured_planned_and_shared(tiny_folder: Path, data: Path) -> None:
    wish = SharingSpec(measure="output_error", threshold=0.5, edges=(500.0,))
    folder = runs.new_run_folder("attention")
    report = runs.run(spec_of(tiny_folder, "attention", recipes=(), prompts=("rocket",), sharing=wish), folder)
    assert {"similarity.safetensors", "similarity.json", "plan.json"} <= {path.name for path in folder.iterdir()}
    plan = SharingSpec.from_json((folder / "plan.json").read_text())
    assert plan.blocks == ((0, 1), (0, 1))
    assert plan.predicted_saving == pytest.approx(0.25)
    assert report["similarity"]["plan"] == plan.to_dict()
    rtn = make_recipe("rtn")
    recipes = (make_recipe("fp"), with_sharing(make_recipe("fp"), plan), rtn, with_sharing(rtn, plan))
    report = runs.run(spec_of(tiny_folder, recipes=recipes), runs.new_run_folder("compare"))
    assert list(report["recipes"]) == ["fp", "fp-again", "fp+sharing", "rtn-w8a8", "rtn-w8a8+sharing"]
    for name in ("fp+sharing", "rtn-w8a8+sharing"):
        row = report["recipes"][name]
        assert row["psnr"] > 15
        assert row["sharing"]["shared_calls"] >= 2 * 2 * STEPS
        assert row["sharing"]["predicted_error"] < 0.5
        assert row["step_ms"]["n"] == 2
    assert "sharing" not in report["recipes"]["rtn-w8a8"]
    assert report["recipes"]["fp+sharing"]["kind"] == "shared"
    with pytest.raises(RecipeError, match="guidance: got 1, which has one branch"):
        spec_of(tiny_folder, "attention", guidance=1.0)
