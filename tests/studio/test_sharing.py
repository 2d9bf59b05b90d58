"""Runs with attention sharing, the plan's file, and the command line that does the same."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from studio import app
from studio.components import html, result
from studio.context import Studio
from studio.services import sharing
from studio.services.form import AppliedPlan, Form, compare_spec, form_of_spec, profile_spec
from studio.services.work import run_work
from tests.studio.fake_core import FakeCore
from trdq_core.arguments import build_parser, spec_from
from trdq_core.errors import RecipeError, StorageError
from trdq_core.specs import RunSpec, SharingSpec

PLAN = SharingSpec(
    blocks=((0, 1), (0,)), edges=(500.0,), measure="output_error", threshold=0.125, predicted_saving=0.1,
    predicted_error=0.05, worst_error=0.1,
)  # fmt: skip
APPLIED = AppliedPlan("pocket-image", PLAN)
NAMES = ["fp", "fp+sharing", "rtn-w4a8", "rtn-w4a8+sharing", "tr-dq-w4a8", "tr-dq-w4a8+sharing"]


@pytest.fixture
def sharing_form(form: Form) -> Form:
    return dataclasses.replace(form, share=True, applied=APPLIED)


def parsed(command: str) -> RunSpec:
    """The run that a shown command asks for."""
    words = shlex.split(command, comments=True)
    assert words[:3] == ["python", "-m", "trdq_core"]
    return spec_from(vars(build_parser().parse_args(words[3:])))


def test_a_ticked_plan_puts_each_recipe_beside_itself(form: Form, sharing_form: Form) -> None:
    recipes = compare_spec(sharing_form).recipes
    assert [recipe.name for recipe in recipes] == NAMES
    assert [recipe.sharing for recipe in recipes] == [None, PLAN] * 3
    assert [recipe.name for recipe in profile_spec(sharing_form).recipes] == NAMES
    assert [recipe.name for recipe in compare_spec(dataclasses.replace(sharing_form, share=False)).recipes] == NAMES[
        ::2
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"applied": None}, "there is no plan yet"),
        ({"applied": AppliedPlan("other", PLAN)}, "made for other and the model is pocket-image"),
        ({"guidance": 1}, "nothing to share"),
    ],
)
def test_a_plan_that_cannot_work_gets_one_sentence(sharing_form: Form, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        compare_spec(dataclasses.replace(sharing_form, **change))


def test_settings_with_sharing_come_back(sharing_form: Form) -> None:
    values = form_of_spec(compare_spec(sharing_form))
    assert (values["share"], values["applied"]) == (True, APPLIED)
    assert (values["method"], values["baseline"]) == ("tr-dq", "rtn")
    plain = form_of_spec(compare_spec(dataclasses.replace(sharing_form, share=False)))
    assert (plain["share"], plain["applied"]) == (False, None)


def test_a_measurement_takes_the_evaluation_prompts_of_the_command_line(form: Form) -> None:
    spec = sharing.attention_spec(form, 3)
    assert spec == parsed("python -m trdq_core attention --prompts 3 --steps 20 --guidance 3.5 --seed 0")
    for count in (0, 2.5, None, 1000):
        with pytest.raises(RecipeError, match="prompts to measure on"):
            sharing.attention_spec(form, count)
    with pytest.raises(RecipeError, match="one branch"):
        sharing.attention_spec(dataclasses.replace(form, guidance=1), 3)


def test_a_trial_is_the_base_and_the_same_with_the_plan(form: Form) -> None:
    full = sharing.trial_spec(form, "fp", PLAN, "pocket-image")
    assert ([recipe.name for recipe in full.recipes], full.prompts) == (["fp", "fp+sharing"], ("red apple",))
    chosen = sharing.trial_spec(form, "chosen", PLAN, "pocket-image")
    assert [recipe.name for recipe in chosen.recipes] == ["fp", "tr-dq-w4a8", "tr-dq-w4a8+sharing"]
    for arguments, said in (
        ((form, "fp", SharingSpec(blocks=((),)), "pocket-image"), "shares no block"),
        ((form, "fp", PLAN, "other"), "made for other"),
        ((form, "both", PLAN, "pocket-image"), "allowed are fp and chosen"),
        ((dataclasses.replace(form, prompt=" "), "fp", PLAN, "pocket-image"), "it is empty"),
    ):
        with pytest.raises(RecipeError, match=said):
            sharing.trial_spec(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        {}, {"groups": 1}, {"group_kind": "per_step", "steps": 6}, {"storage": "shared"},
        {"group_kind": "edges", "edges": "250, 600.5"}, {"method": "vidit-q", "weight_bits": 8, "extra_prompts": 2},
        {"prompt": "a cat's \"hat\" && rm", "guidance": 7, "seed": 5},
    ],
    ids=str,
)  # fmt: skip
def test_the_shown_command_makes_the_run_of_the_page(sharing_form: Form, change: dict[str, Any]) -> None:
    form = dataclasses.replace(sharing_form, **change)
    path = sharing.plan_file(PLAN)
    command = sharing.compare_command(form)
    assert parsed(command.replace("plan.json", str(path))) == compare_spec(form)


def test_the_plan_file_is_what_the_command_line_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = sharing.plan_file(PLAN)
    assert path.name == "plan.json"
    assert SharingSpec.from_json(path.read_text()) == PLAN
    assert sharing.plan_file(dataclasses.replace(PLAN, threshold=0.2)) != path, "visitors do not write over each other"

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="No space left"):
        sharing.plan_file(PLAN)


def test_the_measuring_command_repeats_run_and_plan(studio: Studio, form: Form) -> None:
    folder = run_work(studio.core, sharing.attention_spec(form, 2))(lambda event: None, lambda: False)
    run = studio.runs.open(folder.name)
    assert run is not None
    spec = parsed(sharing.measure_command(run, PLAN))
    assert run.spec is not None
    assert dataclasses.replace(spec, sharing=None) == run.spec
    assert spec.sharing == SharingSpec(edges=(500.0,), measure="output_error", threshold=0.125)
    assert sharing.measure_command(run, SharingSpec(blocks=((0,),))) == "", "a list has no threshold to plan with"


def test_rows_with_sharing_are_named_and_marked(studio: Studio, core: FakeCore, sharing_form: Form) -> None:
    folder = run_work(core, compare_spec(dataclasses.replace(sharing_form, steps=4)))(lambda event: None, lambda: False)
    run = studio.runs.open(folder.name)
    assert run is not None
    titles = [result.title_of(name, facts) for name, facts in run.recipes.items()]
    assert titles[1::2] == ["FP32 + sharing", "RTN W4A8 + sharing", "TR-DQ W4A8 + sharing"]
    table = html.metrics_table(list(zip(titles, run.recipes.values(), strict=True)), run.noise_floor)
    assert table.count("attention sharing in 2 blocks<") == 3
    row = next(line for line in table.split("<tr>") if "FP32 + sharing" in line)
    assert "41.0 dB" in row and "38.0 ms" in row and "float32 linear" in row
    said = "attention sharing in 2 blocks · predicted saving 10.0% of attention FLOPs"
    assert said in html.cards(run.recipes["fp+sharing"])
    lines = {line.name: line.line for line in result.sqnr_figure(run).data}
    for base in titles[2::2]:
        assert lines[base].color == lines[f"{base} + sharing"].color
        assert (lines[base].dash, lines[f"{base} + sharing"].dash) == ("solid", "dash")
    assert len({line.color for line in lines.values()}) == 3
    assert html.sharing_badge(run.recipes["fp"]) == ""
    assert result.under("fp+sharing", run.recipes["fp+sharing"], run) == "full precision with attention sharing"
    assert sharing.pair_of(run) == ("tr-dq-w4a8", "tr-dq-w4a8+sharing")
    assert result.column_names(NAMES) == ["fp", "tr-dq-w4a8", "tr-dq-w4a8+sharing"]
    assert sharing.pair_of(None) is None


def test_a_plan_in_words() -> None:
    assert sharing.plan_words(PLAN) == "2 blocks, output error ≤ 0.125, saves 10.0% of attention FLOPs"
    assert sharing.plan_words(SharingSpec(blocks=((3,),), description="a list")) == "1 block, a list"


def test_an_applied_plan_outlives_a_reload_and_nothing_else_does() -> None:
    assert sharing.restored(sharing.kept(APPLIED)) == APPLIED
    assert sharing.kept(None) is None and sharing.kept("forged") is None
    for text in (
        None,
        3,
        "",
        "{",
        "[]",
        '{"model": "x"}',
        '{"model": "x", "plan": {"blocks": "all"}}',
        "x" * 2_000_000,
    ):
        assert sharing.restored(text) is None
    found, box = app.restored_plan(sharing.kept(APPLIED))
    assert found == APPLIED and box.interactive and box.value is False
