"""From the controls' values to the run that the command line takes, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from studio.services import commands
from studio.services.form import (
    STORAGE_LINES,
    Form,
    baseline_recipe,
    calibrate_spec,
    chosen_recipe,
    compare_spec,
    form_of_spec,
    parse_edges,
    profile_spec,
)
from studio.services.methods import baseline_choices, method_choices
from trdq_core.arguments import CALIBRATION_PROMPTS
from trdq_core.errors import RecipeError
from trdq_core.presets import METHODS
from trdq_core.specs import STORAGE_MODES, RunSpec


def test_a_comparison_has_fp_the_baseline_and_the_method(form: Form) -> None:
    spec = compare_spec(form)
    assert [recipe.name for recipe in spec.recipes] == ["fp", "rtn-w4a8", "tr-dq-w4a8"]
    assert (spec.command, spec.prompts, spec.recipes[2].time.count) == ("compare", ("red apple",), 4)
    assert len(spec.calibration_prompts) == CALIBRATION_PROMPTS, "as the command line, or neither finds the other's"


def test_calibrating_needs_no_prompt_and_profiling_no_pictures(form: Form) -> None:
    assert [r.name for r in calibrate_spec(Form()).recipes] == ["tr-dq-w4a8"]
    assert profile_spec(form).command == "profile"


def test_more_prompts_never_repeat_the_typed_one(form: Form) -> None:
    spec = compare_spec(dataclasses.replace(form, extra_prompts=4))
    assert len(spec.prompts) == 5
    assert len(set(spec.prompts)) == 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": "   "}, "it is empty"),
        ({"prompt": None}, "it is empty"),
        ({"prompt": "x" * 10_000}, "10,000 characters"),
        ({"groups": 30, "steps": 20}, "use at most as many groups as steps"),
        ({"baseline": "tr-dq"}, "choose another baseline"),
        ({"seed": None}, "seed: it is empty"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": float("nan")}, "seed: it is empty or not a number"),
        ({"steps": 4.5}, "give a whole number"),
        ({"steps": 1}, "steps: got 1"),
        ({"guidance": 0.5}, "guidance: got 0.5"),
        ({"weight_bits": 7}, "weight bits: got 7"),
        ({"activation_bits": True}, "activation bits"),
        ({"method": "tr_dq"}, "did you mean tr-dq"),
        ({"group_kind": "other"}, "groups: got the kind"),
        ({"storage": "cloud"}, "storage: got 'cloud'"),
        ({"group_kind": "edges", "edges": "250, soon"}, "got 'soon'"),
        ({"group_kind": "edges", "edges": "500, 250"}, "give rising timesteps"),
        ({"group_kind": "edges", "edges": ""}, "give rising timesteps"),
        ({"group_kind": "edges", "edges": "nan"}, "got 'nan'"),
        ({"extra_prompts": 1000}, "also measure on"),
    ],
)
def test_bad_values_give_one_plain_sentence(form: Form, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        compare_spec(dataclasses.replace(form, **change))
    assert "\n" not in str(caught.value)


def test_edges_make_one_group_more(form: Form) -> None:
    recipe = chosen_recipe(dataclasses.replace(form, group_kind="edges", edges="250, 500 750"))
    assert (recipe.time.edges, recipe.time.count) == ((250.0, 500.0, 750.0), 4)
    assert parse_edges("") == ()


def test_a_run_gives_its_settings_back(form: Form) -> None:
    asked = dataclasses.replace(form, baseline="vidit-q", steps=8, seed=7, groups=2, storage="resident", guidance=2.0)
    spec = compare_spec(asked)
    back = Form(**(vars(Form()) | form_of_spec(RunSpec.from_json(spec.to_json()))))
    assert compare_spec(back) == spec


def test_a_run_of_one_recipe_gives_what_it_has() -> None:
    values = form_of_spec(RunSpec(command="sample", model="pocket-image", prompts=("owl",)))
    assert values["prompt"] == "owl"
    assert "method" not in values


def test_every_method_and_storage_mode_can_be_chosen() -> None:
    ours = {name for _, name in baseline_choices() if not name.startswith("peer-")}
    assert {name for _, name in method_choices()} == ours == set(METHODS) - {"fp"}
    assert set(STORAGE_LINES) == set(STORAGE_MODES)


def test_methods_that_ignore_time_keep_one_group(form: Form) -> None:
    assert baseline_recipe(form).time.count == 1


def test_groups_can_be_fitted_to_the_ranges(form: Form) -> None:
    recipe = chosen_recipe(dataclasses.replace(form, group_kind="dp", groups=3))
    assert (recipe.time.kind, recipe.time.count) == ("dp", 3)
    spec = compare_spec(dataclasses.replace(form, group_kind="dp", groups=3))
    assert "--groups 3 --group-kind dp" in commands.compare(spec, {})
    assert form_of_spec(spec)["group_kind"] == "dp"
