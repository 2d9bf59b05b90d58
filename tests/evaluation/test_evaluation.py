"""Whole evaluations on a tiny stock model: rows, files, going on after a stop, recipes that fail."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trdq_core import runs
from trdq_core.errors import Cancelled, ModelError, RecipeError, ShapeError
from trdq_core.evaluation import command, tables
from trdq_core.evaluation.references import BATCH, plan_batches
from trdq_core.evaluation.scores import SAMPLE_COLUMNS, summary
from trdq_core.presets import parse_recipe
from trdq_core.specs import LowRankSpec, RunSpec

STEPS = 3
PROMPTS = ("tiger face", "rocket", "green salad", "red apple", "face")
NAMES = ["fp", "fp-again", "rtn-w8a8", "rtn-w3a4", "tr-dq-w4a8"]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRDQ_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def spec_of(tiny_folder: Path, **changes: Any) -> RunSpec:
    settings: dict[str, Any] = {
        "command": "evaluate", "model": str(tiny_folder), "prompts": PROMPTS, "seeds": 2, "steps": STEPS,
        "recipes": tuple(parse_recipe(name) for name in ("fp", "rtn-w8a8", "rtn-w3a4", "tr-dq-w4a8")),
        "calibration_prompts": ("red apple",),
    }  # fmt: skip
    return RunSpec(**{**settings, **changes})


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    runs.run(spec_of(tiny_folder), folder)
    return folder


def quality(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its times."""
    return {name: value for name, value in row.items() if "seconds" not in name}


def test_rows_hold_what_is_promised(done: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    assert json.loads((done / "evaluation.json").read_text()) == report
    rows = report["recipes"]
    assert list(rows) == NAMES
    assert report["evaluation"] == {**report["evaluation"], "prompts": 5, "seeds": 2, "pictures": 10, "batch": BATCH}
    floor = rows["fp-again"]
    assert floor["identical"]
    assert (floor["psnr"], floor["identical_pictures"], floor["ssim"], floor["gmsd"]) == (None, 10, 1, 0)
    for name in NAMES[2:]:
        row = rows[name]
        assert (row["kind"], row["n"], row["identical"]) == ("quantized", 10, False)
        assert len(row["latent_sqnr_db"]) == STEPS
        assert row["latent_sqnr_db"][-1] == pytest.approx(row["final_latent_sqnr_db"])
        for metric in tables.QUALITY:
            assert row[f"{metric}_std"] > 0
            assert row[f"{metric}_se"] > 0
        assert row["encoder_kid"] is None
        assert row["encoder_kid_reason"] == "10 pictures; at least 50 are needed"
        assert row["effective_bits"] > 3
        assert sum(row["kernels"].values()) == 20
        assert row["denoise_seconds_per_picture"] > 0
        assert all((done / image).exists() for image in row["images"])
    assert (rows["tr-dq-w4a8"]["method"], rows["tr-dq-w4a8"]["bits"]) == ("tr-dq", "W4A8")
    better, worse = rows["rtn-w8a8"], rows["rtn-w3a4"]
    assert better["final_latent_sqnr_db"] > worse["final_latent_sqnr_db"] + 10
    assert better["encoder_feature_distance"] < worse["encoder_feature_distance"]
    assert better["gmsd"] < worse["gmsd"]


def test_the_rows_are_those_of_a_comparison(done: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The first pictures of an evaluation are those that compare makes, up to what a batch changes in float noise."""
    compared = runs.run(
        spec_of(tiny_folder, command="compare", seeds=1, timing_rounds=1, recipes=(parse_recipe("rtn-w3a4"),)), tmp_path
    )["recipes"]["rtn-w3a4"]
    evaluated = runs.run(spec_of(tiny_folder, seeds=1, recipes=(parse_recipe("rtn-w3a4"),)), tmp_path / "evaluated")
    row = evaluated["recipes"]["rtn-w3a4"]
    assert row["psnr"] == pytest.approx(compared["psnr"], abs=0.3)
    assert row["final_latent_sqnr_db"] == pytest.approx(compared["final_latent_sqnr_db"], abs=0.3)


def test_tables_and_samples_lie_beside_the_report(done: Path) -> None:
    rows = list(csv.DictReader((done / "evaluation.csv").open()))
    assert [row["recipe"] for row in rows] == NAMES
    assert tuple(rows[0]) == tables.CSV_COLUMNS
    report = json.loads((done / "report.json").read_text())["recipes"]
    assert float(rows[2]["psnr"]) == report["rtn-w8a8"]["psnr"]
    assert len(rows[2]["latent_sqnr_db"].split()) == STEPS
    samples = list(csv.DictReader((done / "samples" / "rtn-w3a4.csv").open()))
    assert tuple(samples[0]) == SAMPLE_COLUMNS
    assert [(int(s["prompt"]), int(s["seed"])) for s in samples] == [(i, i) for i in range(5)] + [
        (i, 1000 + i) for i in range(5)
    ]
    assert np.mean([float(s["psnr"]) for s in samples]) == pytest.approx(report["rtn-w3a4"]["psnr"], rel=1e-5)
    text = (done / "evaluation.md").read_text()
    assert text.index("## W8A8") < text.index("## W4A8") < text.index("## W3A4")
    assert "| fp-again (noise floor) |" in text


def test_a_killed_evaluation_goes_on(
    done: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[str] = []
    measure = command._measure

    def dies_at_the_third(session: Any, name: str, *others: Any) -> Any:
        sampled.append(name)
        if name == "rtn-w3a4":
            raise KeyboardInterrupt
        return measure(session, name, *others)

    monkeypatch.setattr(command, "_measure", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        runs.run(spec_of(tiny_folder), tmp_path)
    assert sampled == ["fp-again", "rtn-w8a8", "rtn-w3a4"]
    (tmp_path / "reference" / "batch_001.safetensors").write_bytes(b"cut off")
    monkeypatch.setattr(
        command, "_measure", lambda session, name, *o: sampled.append(name) or measure(session, name, *o)
    )
    sampled.clear()
    events: list[dict[str, Any]] = []
    report = runs.run(spec_of(tiny_folder), tmp_path, on_event=events.append)
    assert sampled == ["rtn-w3a4", "tr-dq-w4a8"], "what was finished is not done again"
    assert any("1 of 4 recipes are done" in event.get("label", "") for event in events)
    resampled = [event for event in events if event["kind"] == "progress" and event["stage"] == "reference"]
    assert [event["done"] for event in resampled] == [STEPS + 1, STEPS + 2, STEPS + 3], "only the damaged batch"
    whole = json.loads((done / "report.json").read_text())["recipes"]
    assert {name: quality(row) for name, row in report["recipes"].items()} == {
        name: quality(row) for name, row in whole.items()
    }


def test_cancelling_keeps_finished_rows_and_another_run_does_not_take_them(tiny_folder: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []

    def second_recipe() -> bool:
        return any(event.get("recipe") == "rtn-w3a4" and event["kind"] == "progress" for event in events)

    with pytest.raises(Cancelled):
        runs.run(spec_of(tiny_folder), tmp_path, on_event=events.append, cancelled=second_recipe)
    assert list(json.loads((tmp_path / "report.json").read_text())["recipes"]) == ["fp", "fp-again", "rtn-w8a8"]
    events.clear()
    other = spec_of(tiny_folder, prompts=PROMPTS[:1], seeds=1, recipes=(parse_recipe("rtn-w8a8"),))
    report = runs.run(other, tmp_path, on_event=events.append)
    assert any(event["kind"] == "warning" and "made anew" in event["text"] for event in events)
    assert report["recipes"]["rtn-w8a8"]["n"] == 1
    assert report["recipes"]["rtn-w8a8"]["psnr_se"] is None, "one picture has no error of its mean"


def test_a_recipe_that_fails_is_a_row_and_is_tried_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tiny_folder, prompts=PROMPTS[:1], seeds=1)
    convert = command.convert_for

    def refuses(session: Any, recipe: Any, statistics: Any) -> Any:
        if recipe.name == "rtn-w3a4":
            raise ShapeError("some layer: it cannot be done.")
        return convert(session, recipe, statistics)

    monkeypatch.setattr(command, "convert_for", refuses)
    report = runs.run(spec, tmp_path)
    assert report["recipes"]["rtn-w3a4"] == {
        "kind": "failed", "method": "rtn", "bits": "W3A4", "error": "some layer: it cannot be done.",
    }  # fmt: skip
    assert report["recipes"]["tr-dq-w4a8"]["kind"] == "quantized"
    assert "rtn-w3a4: some layer: it cannot be done." in (tmp_path / "evaluation.md").read_text()
    monkeypatch.undo()
    again = runs.run(spec, tmp_path)
    assert list(again["recipes"]) == NAMES
    assert again["recipes"]["rtn-w3a4"]["kind"] == "quantized"


def test_a_recipe_that_no_layer_takes_is_a_row_before_anything_is_sampled(tiny_folder: Path, tmp_path: Path) -> None:
    rule = parse_recipe("svdquant-w4a4").rules[0]
    deep = dataclasses.replace(
        parse_recipe("svdquant-w4a4"), rules=(dataclasses.replace(rule, low_rank=LowRankSpec(rank=1000)),)
    )
    events: list[dict[str, Any]] = []
    spec = spec_of(tiny_folder, prompts=PROMPTS[:1], seeds=1, recipes=(parse_recipe("rtn-w8a8"), deep))
    report = runs.run(spec, tmp_path, on_event=events.append)
    assert {name: row["kind"] for name, row in report["recipes"].items()} == {
        "fp": "reference", "fp-again": "noise_floor", "rtn-w8a8": "quantized", "svdquant-w4a4": "failed",
    }  # fmt: skip
    assert "to_q: low_rank rank=1000 is more than the 128" in report["recipes"]["svdquant-w4a4"]["error"]
    kinds = [event["kind"] for event in events]
    assert kinds.index("warning") < kinds.index("progress"), "said before the reference is sampled"
    events.clear()
    with pytest.raises(ShapeError, match="low_rank rank=1000"):
        runs.run(spec_of(tiny_folder, recipes=(deep,)), tmp_path / "alone", on_event=events.append)
    assert "progress" not in [event["kind"] for event in events]


def test_latents_that_are_not_finite_are_a_failure(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = command.convert_for

    def broken(*arguments: Any) -> Any:
        conversion = convert(*arguments)
        conversion.denoiser.proj_out.register_forward_hook(lambda module, args, out: out * float("nan"))
        return conversion

    monkeypatch.setattr(command, "convert_for", broken)
    spec = spec_of(tiny_folder, prompts=PROMPTS[:1], seeds=1, recipes=(parse_recipe("rtn-w8a8"),))
    row = runs.run(spec, tmp_path)["recipes"]["rtn-w8a8"]
    assert row["kind"] == "failed"
    assert "latents are not finite after step 1" in row["error"]


def test_what_cannot_be_evaluated_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="prompts: there are none"):
        runs.run(spec_of(tiny_folder, prompts=()), tmp_path / "a")
    with pytest.raises(RecipeError, match="seeds: got 0; allowed is 1 to 100"):
        spec_of(tiny_folder, seeds=0)
    with pytest.raises(ModelError, match="its weights are random and make no pictures"):
        runs.run(RunSpec(command="evaluate", model="random-dit", prompts=("x",), steps=2), tmp_path / "b")


def test_samples_are_spread_over_prompts_first() -> None:
    spec = RunSpec(command="evaluate", model="m", prompts=tuple("abcdef"), seeds=2, seed=7)
    batches = plan_batches(spec)
    assert [len(batch) for batch in batches] == [8, 4]
    samples = [tuple(sample) for batch in batches for sample in batch]
    assert samples[:2] + samples[6:7] == [(0, 7), (1, 8), (0, 1007)]


def test_standard_errors_count_prompts_not_pictures() -> None:
    found = summary("x", [1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1])
    assert found["x"] == 2.5
    assert found["x_std"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert found["x_se"] == pytest.approx(np.std([2, 3], ddof=1) / math.sqrt(2))
    assert summary("x", [1.0, math.inf], [0, 0]) == {"x": 1.0, "x_std": None, "x_se": None}
    assert summary("x", [1.0, 3.0], [0, 0])["x_se"] == pytest.approx(1)
