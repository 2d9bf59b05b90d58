"""Every layer alone: what is measured, saved, loaded, gone on with; and a budget's recipe that weighs what it promised."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trdq_core import runs
from trdq_core.budget import allocate
from trdq_core.errors import CalibrationError, Cancelled, RecipeError, StorageError
from trdq_core.folders import RunFolder
from trdq_core.kernels import dispatch
from trdq_core.models import load_model
from trdq_core.presets import parse_recipe
from trdq_core.sensitivity.table import Sensitivity
from trdq_core.session import Session, convert_for, statistics_for
from trdq_core.specs import RunSpec
from trdq_core.terminal import report_text

BITS = ("W8A8", "W4A8", "W3A4")


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRDQ_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def spec_of(tiny_folder: Path, method: str = "rtn", **changes: Any) -> RunSpec:
    bits = changes.pop("bits", BITS)
    settings: dict[str, Any] = {
        "command": "sensitivity", "model": str(tiny_folder), "prompts": ("red apple",), "steps": 3,
        "recipes": tuple(parse_recipe(f"{method}-{label}") for label in bits),
        "calibration_prompts": ("tiger face",), "bits": bits,
    }  # fmt: skip
    return RunSpec(**{**settings, **changes})


@pytest.fixture(scope="module")
def measured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    runs.run(spec_of(tiny_folder), folder)
    return folder


def test_a_run_leaves_a_table_of_all_layers(measured: Path) -> None:
    table = Sensitivity.load(measured)
    report = json.loads((measured / "report.json").read_text())
    assert table.bits == BITS
    assert len(table.layers) == 20
    assert table.about["complete"]
    assert table.about["method"] == "rtn"
    assert len(table.about["timesteps"]) == 3
    assert len((measured / "sensitivity.csv").read_text().splitlines()) == 1 + 20 * 3
    for layer in table.layers:
        errors = [layer.cells[label].layer_error for label in BITS]
        assert 0 < errors[0] < errors[1] < errors[2] < 1, f"{layer.layer}: fewer bits, larger error"
        assert layer.cells["W3A4"].denoiser_error > layer.cells["W8A8"].denoiser_error > 0
        assert layer.cells["W3A4"].packed_bytes < layer.cells["W4A8"].packed_bytes < layer.cells["W8A8"].packed_bytes
    groups = table.groups()
    assert [x.role for x in groups["transformer_blocks.0.attn1.to_q"]] == ["self_q", "self_k", "self_v"]
    assert report["sensitivity"]["totals"]["W8A8"]["bytes"] == sum(x.cells["W8A8"].bytes for x in table.layers)


def test_a_table_survives_the_file(measured: Path, tmp_path: Path) -> None:
    table = Sensitivity.load(measured)
    table.save(tmp_path / "deep" / "mine.json")
    assert Sensitivity.load(tmp_path / "deep" / "mine.json") == table


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read .*run the sensitivity command first"):
        Sensitivity.load(tmp_path / "none.json")
    for text, words in (
        ("{", "damaged"),
        ("{}", "not a sensitivity table"),
        ("[]", "not a sensitivity table"),
        ('{"format_version": 99}', "format 99 is newer"),
    ):
        (tmp_path / "sensitivity.json").write_text(text)
        with pytest.raises(CalibrationError, match=words):
            Sensitivity.load(tmp_path)


def test_a_layer_alone_leaves_the_model_as_it_was(tiny_folder: Path, measured: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    runs.run(spec_of(tiny_folder), again)
    assert Sensitivity.load(again).layers == Sensitivity.load(measured).layers, "the same run, the same numbers"


def test_a_stopped_run_goes_on_with_the_next_bits(tiny_folder: Path, measured: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []

    def fitting_the_third() -> bool:
        return sum(event["kind"] == "stage" and event["stage"] == "fit" for event in events) >= 3

    with pytest.raises(Cancelled):
        runs.run(spec_of(tiny_folder), tmp_path, on_event=events.append, cancelled=fitting_the_third)
    partial = Sensitivity.load(tmp_path)
    assert partial.bits == BITS[:2]
    assert not partial.about["complete"]
    events.clear()
    runs.run(spec_of(tiny_folder), tmp_path, on_event=events.append)
    assert [event["recipe"] for event in events if event.get("stage") == "fit" and event["kind"] == "stage"] == [
        "rtn-w3a4"
    ]
    assert Sensitivity.load(tmp_path).layers == Sensitivity.load(measured).layers


def test_what_cannot_be_measured_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"prompts": ()}, "at least one prompt and one bit-width"),
        ({"recipes": ()}, "got 0 recipes for 3 bit-widths"),
    ):
        with pytest.raises(RecipeError, match=words):
            runs.run(spec_of(tiny_folder, **changes), tmp_path / words[:9])


@pytest.mark.parametrize("method", ["rtn", "tr-dq"])
def test_a_budget_recipe_weighs_what_the_table_promised(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    spec = spec_of(tiny_folder, method, bits=("W8A8", "W4A8"))
    runs.run(spec, tmp_path / "run")
    table = Sensitivity.load(tmp_path / "run")
    low, high = (sum(layer.cells[label].bytes for layer in table.layers) for label in ("W4A8", "W8A8"))
    found = allocate(table, (low + high) // 2)
    assert {choice.bits for choice in found.choices} == {"W8A8", "W4A8"}
    model = load_model(spec.model)
    session = Session(
        spec, RunFolder(tmp_path / "again", spec), lambda: False, model, dispatch.select_backend(model.device)
    )
    conversion = convert_for(session, found.recipe, statistics_for(session, {}))
    assert conversion.facts()["weight_bytes"] == found.bytes <= found.budget
    quantizers = {
        conversion.denoiser.get_submodule(f"transformer_blocks.0.attn1.{leaf}").input_quantizer
        for leaf in ("to_q", "to_k", "to_v")
    }
    assert len(quantizers) == 1, "q, k and v go on sharing one transform"
    assert torch.isfinite(torch.tensor(found.error))


def test_roles_add_up_their_layers(measured: Path) -> None:
    table = Sensitivity.load(measured)
    report = json.loads((measured / "report.json").read_text())["sensitivity"]
    roles = table.roles()
    assert sum(role.layers for role in roles.values()) == len(table.layers)
    assert list(report["roles"]) == list(roles)
    for label in BITS:
        own = [layer.cells[label].denoiser_error for layer in table.layers if layer.role == "mlp_in"]
        assert (
            roles["mlp_in"].cells[label].denoiser_error
            == pytest.approx(sum(own))
            == pytest.approx(report["roles"]["mlp_in"]["cells"][label]["denoiser_error"])
        )
        assert sum(r["cells"][label]["bytes"] for r in report["roles"].values()) == report["totals"][label]["bytes"]
    rows = list(csv.DictReader((measured / "sensitivity_roles.csv").open()))
    assert len(rows) == len(roles) * len(BITS)
    assert {row["role"]: int(row["layers"]) for row in rows} == {name: role.layers for name, role in roles.items()}
    assert "mlp_in" in report_text({"recipes": {}, "sensitivity": report}).partition("role  ")[2]


def test_a_method_with_time_groups_is_scanned_and_budgeted_in_them(
    tiny_folder: Path, measured: Path, tmp_path: Path
) -> None:
    bits = ("W8A8", "W4A8")
    recipes = tuple(parse_recipe(f"tr-dq-{label}", groups=2, storage="resident") for label in bits)
    runs.run(spec_of(tiny_folder, bits=bits, recipes=recipes), tmp_path)
    table = Sensitivity.load(tmp_path)
    found = allocate(table, sum(layer.cells["W4A8"].bytes for layer in table.layers) * 3 // 2)
    assert (found.recipe.time.count, found.recipe.storage) == (2, "resident")
    plain = Sensitivity.load(measured)
    pairs = [(a.cells["W4A8"].bytes, b.cells["W4A8"].bytes) for a, b in zip(table.layers, plain.layers, strict=True)]
    heavier = [grouped for grouped, single in pairs if grouped > 1.9 * single]
    assert heavier, "two sets of weights weigh twice as much where a transform was kept"
