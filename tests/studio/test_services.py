"""Plans, stored runs, pictures, statistics and models: found by listed names only."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio.context import Studio
from studio.services import machine, models, pictures, prompts, stored
from studio.services.form import Form, calibrate_spec, chosen_recipe, compare_spec
from studio.services.stored import StoredRun
from studio.services.work import run_work
from tests.studio.fake_core import LAYERS, FakeCore
from trdq_core.errors import ModelError, RecipeError, StorageError


def finished(studio: Studio, form: Form) -> StoredRun:
    """A comparison that ran to its end."""
    folder = run_work(studio.core, compare_spec(dataclasses.replace(form, steps=4)))(lambda event: None, lambda: False)
    run = studio.runs.open(folder.name)
    assert run is not None
    return run


def test_plan_follows_the_form_and_prices_every_storage_mode(studio: Studio, form: Form) -> None:
    view = studio.plans.of(form)
    assert [mode for mode, _, _ in view.prices] == ["shared", "resident", "switched"]
    prices = {mode: (device, disk) for mode, device, disk in view.prices}
    assert prices["resident"][0] == 4 * prices["shared"][0]
    assert prices["switched"][0] == prices["shared"][0]
    assert view.calibration is None
    assert studio.plans.of(dataclasses.replace(form, method="rtn", baseline="vidit-q")).prices == ()


def test_plan_names_the_calibration_that_will_be_used_again(studio: Studio, form: Form) -> None:
    run_work(studio.core, calibrate_spec(form))(lambda event: None, lambda: False)
    found = studio.plans.of(form).calibration
    assert found is not None
    assert studio.plans.of(dataclasses.replace(form, steps=10)).calibration is None


def test_bad_forms_give_the_cores_sentence(studio: Studio, form: Form) -> None:
    with pytest.raises(RecipeError, match="use at most as many groups"):
        studio.plans.of(dataclasses.replace(form, groups=30))


@pytest.mark.parametrize("name", ["/etc", "../assets/pocket-image", "foreign", "", "nobody/model"])
def test_only_listed_models_are_ever_passed_on(studio: Studio, core: FakeCore, form: Form, name: str) -> None:
    asked = dataclasses.replace(form, model=name)
    with pytest.raises(ModelError):
        studio.plans.of(asked)
    with pytest.raises(ModelError):
        run_work(core, compare_spec(asked))
    with pytest.raises(ModelError):
        models.plan(core, name, "rtn-w8a8", 1)
    assert core.runs.calls == []


def test_models_are_listed_without_paths(core: FakeCore) -> None:
    assert [name for name, _ in models.choices(core)] == ["pocket-image", "pocket-video"]
    assert "holds no transformer" in models.line(core, "pocket-image")
    assert all("path" not in facts for facts in models.facts(core))
    assert models.plan(core, "pocket-image", "rtn-w8a8", 1)["layers"][0]["layer"] == LAYERS[0]


def test_a_stored_run_is_read_back_whole(studio: Studio, form: Form) -> None:
    run = finished(studio, form)
    assert (run.state, list(run.recipes), run.prompts) == ("done", ["fp", "rtn-w4a8", "tr-dq-w4a8"], ["red apple"])
    assert run.noise_floor is not None
    assert run.picture("fp", 0) is not None
    assert run.picture("fp", 1) is None
    assert run.picture("fp", -1) is None
    assert run.picture("nobody", 0) is None
    assert studio.runs.rows()[0].recipes == "fp, rtn-w4a8, tr-dq-w4a8"
    assert stored.command_line(run).startswith("python -m trdq_core compare --spec ")


@pytest.mark.parametrize("run_id", ["..", "../..", "/etc", "", None, "nobody"])
def test_runs_open_by_listed_ids_only(studio: Studio, form: Form, run_id: str | None) -> None:
    finished(studio, form)
    assert studio.runs.open(run_id) is None


def test_a_report_cannot_lead_out_of_its_folder(studio: Studio, form: Form, tmp_path: Path) -> None:
    run = finished(studio, form)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    report = json.loads((run.folder / "report.json").read_text())
    report["recipes"]["fp"]["images"] = ["../../secret.png"]
    (run.folder / "report.json").write_text(json.dumps(report))
    again = studio.runs.open(run.id)
    assert again is not None
    assert again.picture("fp", 0) is None


def test_damaged_runs_do_not_hide_the_others(studio: Studio, form: Form) -> None:
    run = finished(studio, form)
    (run.folder / "report.json").write_text("{")
    (run.folder / "spec.json").write_text('{"command": "dance"}')
    again = studio.runs.open(run.id)
    assert again is not None
    assert (again.report, again.spec, again.prompts) == ({}, None, [])
    assert len(studio.runs.rows()) == 1


def test_the_archive_holds_the_whole_run(studio: Studio, form: Form) -> None:
    run = finished(studio, form)
    names = zipfile.ZipFile(stored.archive(run)).namelist()
    assert {f"{run.id}/report.json", f"{run.id}/spec.json", f"{run.id}/images/fp_000.png"} <= set(names)


def test_an_archive_on_a_full_disk_gives_a_sentence(
    studio: Studio, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(studio, form)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        stored.archive(run)


def test_difference_is_signed_scaled_and_not_normalised() -> None:
    grey, lighter = (Image.new("RGB", (400, 400), (value,) * 3) for value in (100, 110))
    same = pictures.difference(grey, grey, 16)
    warm, cool = pictures.difference(grey, lighter, 4), pictures.difference(lighter, grey, 4)
    assert same is not None and same.getpixel((0, 0)) == (247, 247, 247)
    assert warm is not None and cool is not None
    red, blue = warm.getpixel((0, 0)), cool.getpixel((0, 0))
    assert red[0] > red[2] and blue[2] > blue[0]
    share = 4 * 10 / 255
    assert np.allclose(red, pictures.EVEN + (pictures.WARM - pictures.EVEN) * share, atol=1)
    assert pictures.difference(grey, Image.new("RGB", (8, 8)), 1) is None


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    picture = pictures.enlarge(Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)))
    assert picture.size == (384, 384)
    assert len(set(picture.crop((0, 0, 6, 6)).getdata())) == 1


def test_statistics_offer_layers_groups_and_edges(studio: Studio, form: Form) -> None:
    assert studio.statistics.usual_seconds(None) is None
    run_work(studio.core, calibrate_spec(form))(lambda event: None, lambda: False)
    info = studio.statistics.calibrations("pocket-image")[0]
    recipe = chosen_recipe(form)
    assert studio.statistics.find(info.fingerprint) == info
    assert studio.statistics.find("nobody") is None
    assert studio.statistics.layers(info) == list(LAYERS)
    assert len(studio.statistics.group_labels(info, LAYERS[0], recipe)) == 4
    assert studio.statistics.timeline(info, LAYERS[0], recipe).edges == [250.0, 500.0, 750.0]
    assert studio.statistics.usual_seconds("pocket-image") == 12.0


def test_prompts_are_offered_even_without_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trdq_core.prompts.PROMPTS_FILE", tmp_path / "none.json")
    prompts._stored.cache_clear()
    assert prompts.examples("pocket-image")[0]
    assert len(prompts.calibration("pocket-image")) == 16
    prompts._stored.cache_clear()


def test_a_video_model_brings_its_own_prompts() -> None:
    own = set(prompts.calibration("pocket-video")) | set(prompts.evaluation("pocket-video", 32, ""))
    assert len(own) > 40
    assert {"whale", "turtle", "teddy bear"} <= set(prompts.examples("pocket-video")) & own
    assert not own & {"red apple", "watermelon"}
    assert prompts.calibration("/etc") == prompts.calibration("pocket-image"), "no path is looked at"
    first = prompts.examples("pocket-video")[0]
    for before, after in (("", first), ("watermelon", first), ("my own words", "my own words"), ("zebra", "zebra")):
        assert prompts.kept("pocket-video", before) == after
    assert prompts.kept("pocket-image", "minibus") == prompts.examples("pocket-image")[0]


def test_machine_facts_are_plausible() -> None:
    facts = machine.facts()
    assert facts.threads >= 1
    assert 0 < facts.ram_free <= facts.ram_total
