"""Methods in the list, saved recipes, scans, and plans changed layer by layer. The fake core throughout, so no torch."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from studio.components import sensitivity
from studio.context import Studio
from studio.services import commands, methods, scans
from studio.services.edits import Bits, bits_from
from studio.services.form import Form, chosen_recipe, compare_spec, form_of_spec, plain_comparison
from studio.services.recipes import LONGEST_NAME, check_name
from studio.services.work import run_work
from tests.studio.fake_core import LAYERS, FakeCore
from trdq_core.arguments import build_parser, spec_from
from trdq_core.errors import CalibrationError, Cancelled, ModelError, RecipeError, StorageError
from trdq_core.presets import METHODS, make_recipe
from trdq_core.specs import LayerRule, Recipe, RunSpec

COUNT = len(LAYERS)
SIZE = 4 * 384 * 384


def scanned(studio: Studio, form: Form, **asked: Any) -> scans.ScanView:
    given = {"method": "rtn", "bits": ["W8A8", "W4A8"], "count": 2} | asked
    folder = run_work(studio.core, scans.scan_spec(form, **given))(lambda event: None, lambda: False)
    return studio.scans.open(folder.name)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "fp"])
def test_every_method_has_a_title_a_line_and_says_how_it_computes(name: str) -> None:
    facts = methods.facts_of(name, 4, 8)
    assert facts.title != name and facts.description and facts.source
    assert facts.link.startswith("https://arxiv.org/abs/") == facts.source.startswith("arXiv")
    both = dict(methods.method_choices()), dict(methods.baseline_choices())
    assert all(name in choices.values() for choices in both), "as method and as baseline"


@pytest.mark.parametrize(
    ("name", "simulated", "calibration"),
    [
        ("rtn", False, "none"), ("rtn-static", False, "second pass"), ("tr-dq", False, "none"),
        ("q-diffusion", True, "learns rounding (minutes)"), ("tq-dit", True, "second pass"),
        ("lrq-dit", True, "none"), ("q-dit", True, "none"),
    ],
)  # fmt: skip
def test_arithmetic_and_calibration_are_told_before_anything_runs(name: str, simulated: bool, calibration: str) -> None:
    facts = methods.facts_of(name, 4, 8)
    assert (facts.simulated, facts.calibration) == (simulated, calibration)
    label = next(label for label, value in methods.method_choices() if value == name)
    assert label.endswith("(simulated)") == simulated


def test_bits_that_no_method_takes_give_no_line() -> None:
    assert methods.chosen_facts("rtn", 7, 8, ()) is None
    assert methods.chosen_facts("nobody", 4, 8, ()) is None
    assert methods.chosen_facts("saved:gone", 4, 8, ()) is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "it is empty"), (None, "it is empty"), ("x" * (LONGEST_NAME + 1), "characters"), ("../up", "small letters"),
        ("My Plan", "small letters"), ("rtn", "method's own"), ("tr-dq-w4a8", "method's own"), ("fp", "method's own"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_used_get_one_sentence(name: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        check_name(name)


def test_a_saved_recipe_is_a_method_that_compares_and_comes_back(studio: Studio, form: Form) -> None:
    edit = studio.edits.change(studio.edits.start("pocket-image", chosen_recipe(form), 20), [LAYERS[0]], None)
    file = studio.recipes.save("my-plan", studio.edits.recipe(edit))
    assert Recipe.from_json(file.read_text()) == studio.recipes.open("my-plan")
    saved = studio.recipes.all()
    assert ("my-plan (saved recipe)", "saved:my-plan") in methods.method_choices(saved)
    asked = dataclasses.replace(form, method="saved:my-plan", saved=saved, extra_prompts=0)
    spec = compare_spec(asked)
    assert spec.recipes[-1] == saved[0]
    assert studio.plans.of(asked).prices == ()
    values = form_of_spec(RunSpec.from_json(spec.to_json()), saved)
    assert (values["method"], values["baseline"], values["weight_bits"]) == ("saved:my-plan", "rtn", 4)
    assert "method" not in form_of_spec(spec), "a recipe that was deleted is not chosen"
    line = commands.compare(spec, studio.recipes.files())
    assert spec_from(vars(build_parser().parse_args(shlex.split(line)[3:]))) == spec
    with pytest.raises(RecipeError, match="no saved recipe called 'gone'"):
        chosen_recipe(dataclasses.replace(asked, method="saved:gone"))


def test_damaged_recipes_do_not_hide_the_others(studio: Studio, tmp_path: Path) -> None:
    studio.recipes.save("good", make_recipe("rtn"))
    (tmp_path / "recipes" / "bad.json").write_text('{"name": 3}')
    (tmp_path / "recipes" / "worse.json").write_bytes(b"\xff\xfe")
    assert studio.recipes.names() == ["good"]
    with pytest.raises(RecipeError, match="none called '../good'"):
        studio.recipes.open("../good")


def test_a_full_disk_gives_a_sentence(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="No space left"):
        studio.recipes.save("mine", make_recipe("rtn"))


def test_a_scan_is_what_the_command_line_would_make(form: Form) -> None:
    spec = scans.scan_spec(form, "rtn", ["W4A8", "W8A8"], 2)
    given = vars(build_parser().parse_args(["sensitivity", "--bits", "W8A8,W4A8"]))
    assert spec == spec_from(given)


def test_a_scan_takes_the_time_groups_of_the_sidebar(studio: Studio, form: Form) -> None:
    asked = dataclasses.replace(form, group_kind="uniform", groups=3, storage="resident")
    spec = scans.scan_spec(asked, "tr-dq", ["W8A8", "W4A8"], 2)
    flags = "sensitivity --bits W8A8,W4A8 --method tr-dq --groups 3 --storage resident"
    assert spec == spec_from(vars(build_parser().parse_args(flags.split())))
    view = scanned(studio, asked, method="tr-dq")
    assert "3 time groups" in view.title
    assert "time groups" not in scanned(studio, asked, method="rtn").title


def test_the_numbers_begin_with_roles(studio: Studio, form: Form) -> None:
    view = scanned(studio, form)
    shown = sensitivity.numbers(view)
    roles = view.table.roles()
    assert shown.index("role, errors added up") < shown.index("role and shape")
    for role in roles.values():
        assert f"<td>{role.role}</td><td>{role.layers}</td>" in shown
        assert f"{role.cells['W4A8'].denoiser_error:.2e}" in shown


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "fp"}, "choose a method"), ({"method": "saved:x"}, "choose a method"), ({"bits": []}, "at least one"),
        ({"bits": None}, "at least one"), ({"count": 0}, "scan prompts: got 0"), ({"count": None}, "scan prompts"),
    ],
)  # fmt: skip
def test_scans_that_cannot_be_made_get_one_sentence(form: Form, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        scans.scan_spec(form, **({"method": "rtn", "bits": ["W8A8"], "count": 2} | change))


def test_a_stored_scan_is_listed_sorted_and_by_listed_ids_only(studio: Studio, form: Form) -> None:
    view = scanned(studio, form)
    assert [run for _, run in studio.scans.choices("pocket-image")] == [view.id]
    assert "RTN · W8A8, W4A8 · 2 prompts" in view.title
    bars = view.bars("W4A8", "denoiser_error", "largest")
    assert [bar.error for bar in bars] == sorted((bar.error for bar in bars), reverse=True)
    assert [bar.layer for bar in view.bars("W4A8", "layer_error", "model")] == list(LAYERS)
    roles = [bar.role for bar in view.bars("W8A8", "layer_error", "role")]
    assert roles == ["self_q"] * 3 + ["cross_q"] * 3 + ["mlp_in"] * 3
    for bad in (("W2A8", "layer_error"), ("W8A8", "psnr")):
        with pytest.raises(RecipeError, match="got"):
            view.bars(*bad, "model")
    for run_id in ("..", None, "nobody"):
        with pytest.raises(CalibrationError, match="not there any more"):
            studio.scans.open(run_id)
    (view.folder / "sensitivity.json").write_text("{")
    assert studio.scans.choices("pocket-image") == []


def test_a_stopped_scan_keeps_its_finished_bits(studio: Studio, core: FakeCore, form: Form) -> None:
    said: list[Any] = []
    spec = scans.scan_spec(form, "rtn", ["W8A8", "W4A8"], 2)
    with pytest.raises(Cancelled):
        run_work(core, spec)(said.append, lambda: len(said) > COUNT + 3)
    view = studio.scans.open(core.runs.list_runs()[0].id)
    assert view.table.bits == ("W8A8",)
    assert "stopped early" in view.title


def test_an_edited_plan_adds_up(studio: Studio, form: Form) -> None:
    view = scanned(studio, form)
    start = studio.edits.start("pocket-image", make_recipe("rtn", weight_bits=4, activation_bits=8), 20)
    before = studio.edits.view(start, view.errors())
    assert (len(before.layers), before.skipped, before.unmeasured) == (COUNT, 0, 0)
    assert before.error == pytest.approx(sum(x.cells["W4A8"].denoiser_error for x in view.table.layers))
    skipped = studio.edits.change(start, [LAYERS[0]], None)
    wide = studio.edits.change(skipped, ["role:mlp_in"], Bits(8, 8))
    after = studio.edits.view(wide, view.errors())
    assert [x.bits for x in after.layers[:3]] == [None, Bits(4, 8), Bits(8, 8)]
    assert after.bytes == SIZE + 5 * (SIZE // 8 + 1536) + 3 * (SIZE // 4 + 1536)
    assert after.effective_bits == pytest.approx(32 * after.bytes / (COUNT * SIZE))
    assert after.error is not None and before.error is not None and after.error < before.error
    assert studio.edits.view(studio.edits.change(wide, ["*"], Bits(3, 4)), view.errors()).unmeasured == COUNT
    assert studio.edits.view(wide).error is None
    assert studio.edits.undo(wide, ["*"]) == start
    assert studio.edits.change(skipped, [LAYERS[0]], Bits(4, 8)).changes == {}, "as it was is no change"


def test_other_bits_take_the_rule_that_the_method_has_for_them(studio: Studio) -> None:
    start = studio.edits.start("pocket-image", make_recipe("svdquant", weight_bits=4, activation_bits=4), 20)
    recipe = studio.edits.recipe(studio.edits.change(start, [LAYERS[0]], Bits(8, 8)))
    assert recipe.rules[0].weight == make_recipe("svdquant").rules[0].weight, "per channel at 8 bits, groups at 4"
    mine = dataclasses.replace(start.base, name="mine")
    kept = studio.edits.recipe(
        studio.edits.change(studio.edits.start("pocket-image", mine, 20), [LAYERS[0]], Bits(8, 8))
    )
    assert kept.rules[0].weight == dataclasses.replace(mine.rules[0].weight, bits=8), (
        "a recipe of no method keeps its grid"
    )


def test_layers_of_one_module_share_one_rule(studio: Studio, core: FakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = core.runs.plan("pocket-image", make_recipe("rtn")).layers
    names = {"attn1.to_q": "self_q", "attn1.to_k": "self_k", "attn1.to_v": "self_v", "attn1.to_out.0": "self_out"}
    layers = [rows[0]._replace(layer=f"blocks.1.{name}", role=role) for name, role in names.items()]
    layers += [layer._replace(layer=layer.layer.replace("1.", "10.", 1)) for layer in layers]
    plan = core.runs.plan("pocket-image", make_recipe("rtn"))._replace(layers=tuple(layers))
    monkeypatch.setattr(core.runs, "plan", lambda model, recipe, steps=20: plan)
    start = studio.edits.start("pocket-image", make_recipe("rtn"), 20)
    qkv = [f"blocks.1.{name}" for name in names][:3]
    rules = studio.edits.recipe(studio.edits.change(start, qkv, Bits(4, 8))).rules
    assert [(rule.match, rule.roles) for rule in rules[:-1]] == [("blocks.1.attn1.*", ("self_q", "self_k", "self_v"))]
    two = studio.edits.recipe(studio.edits.change(start, [*qkv, "blocks.1.attn1.to_out.0"], None)).rules
    assert {rule.match for rule in two[:-1]} == {"blocks.1.attn1.*", "blocks.1.attn1.to_out.*"}
    assert two[0] == LayerRule(match="blocks.1.attn1.*", roles=("self_q", "self_k", "self_v"))


def test_bad_edits_get_one_sentence(studio: Studio) -> None:
    start = studio.edits.start("pocket-image", make_recipe("rtn"), 20)
    for picked, to, sentence in (
        ([], None, "none is picked"), (None, None, "none is picked"), (["proj_out"], None, "none that rtn-w8a8 quantizes"),
        (["*"], None, "leave at least one"), ([LAYERS[0]], Bits(7, 8), "weight bits: got 7"),
        ([LAYERS[0]], Bits(8, 2), "activation bits: got 2"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=sentence):
            studio.edits.change(start, picked, to)
    with pytest.raises(RecipeError, match="weight bits"):
        bits_from(None, 8)
    with pytest.raises(RecipeError, match="quantizes nothing"):
        studio.edits.start("pocket-image", make_recipe("fp"), 20)
    with pytest.raises(ModelError, match="got '/etc'"):
        studio.edits.start("/etc", make_recipe("rtn"), 20)


def test_a_budget_fills_the_plan_and_refuses_in_one_sentence(studio: Studio, form: Form) -> None:
    view = scanned(studio, form)
    found = studio.scans.allocate(view, "0.2")
    plan = studio.edits.view(studio.edits.start("pocket-image", found.recipe, 20), view.errors())
    assert plan.bytes == found.bytes <= 0.2 * COUNT * SIZE
    assert {layer.bits for layer in plan.layers} == {Bits(8, 8), Bits(4, 8)}
    for text, sentence in (("", "budget: it is empty"), ("much", "budget: got 'much'"), ("12", "budget: got 12")):
        with pytest.raises(RecipeError, match=sentence):
            studio.scans.allocate(view, text)
    assert scans.budget_command(view, " 0.2 ").endswith(f"--sensitivity {view.folder} --bytes 0.2 --out plan.json")


def test_the_comparison_of_a_plan_leaves_an_equal_baseline_out(form: Form) -> None:
    spec = plain_comparison(form, make_recipe("rtn", weight_bits=4, activation_bits=8))
    assert [recipe.name for recipe in spec.recipes] == ["fp", "rtn-w4a8"]


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 4, "storage": "resident"}, {"group_kind": "per_step"}, {"group_kind": "edges", "edges": "250, 500"},
        {"method": "quarot", "baseline": "tr-dq", "groups": 2}, {"method": "rtn-mse", "weight_bits": 3},
    ],
)  # fmt: skip
def test_the_command_compares_the_same(form: Form, change: dict[str, Any]) -> None:
    spec = compare_spec(dataclasses.replace(form, **change))
    assert spec_from(vars(build_parser().parse_args(shlex.split(commands.compare(spec, {}))[3:]))) == spec
