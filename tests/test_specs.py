"""Specifications: JSON both ways, and every refusal one plain sentence."""

from __future__ import annotations

import json

import pytest

from trdq_core.errors import RecipeError
from trdq_core.presets import make_recipe
from trdq_core.specs import (
    LayerRule,
    QuantSpec,
    Recipe,
    RunSpec,
    TimeGroupSpec,
    TransformSpec,
    check_prompt,
)


def run_spec(**changes: object) -> RunSpec:
    return RunSpec(**{"command": "compare", "model": "pocket-image", "prompts": ("red apple",), **changes})


@pytest.mark.parametrize("method", ["fp", "rtn", "smoothquant", "vidit-q", "tr-dq"])
def test_recipes_survive_json(method: str) -> None:
    recipe = make_recipe(method, weight_bits=4, activation_bits=8, groups=4)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_runs_survive_json() -> None:
    spec = run_spec(recipes=(make_recipe("tr-dq", groups=2),), backend="torch")
    assert RunSpec.from_json(spec.to_json()) == spec


def test_unknown_keys_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(RecipeError, match="QuantSpec: unknown key 'bit'; allowed keys are bits, symmetric"):
        QuantSpec.from_dict({"bit": 4})
    nested = json.loads(make_recipe("rtn").to_json())
    nested["rules"][0]["weight"]["colour"] = "red"
    with pytest.raises(RecipeError, match="unknown key 'colour'"):
        Recipe.from_dict(nested)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "not JSON"),
        ("{}", "a required key is missing"),
        ('{"name": 3}', "Recipe.name: expected str, got 3"),
        ('{"name": "x", "rules": {}}', "Recipe.rules: expected a list"),
        ('{"name": "x", "storage": "cloud"}', "allowed are 'shared', 'resident', 'switched'"),
        ('{"name": "x", "format_version": 99}', "got 99; this version reads up to 1"),
    ],
)
def test_damaged_recipes_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantSpec(bits=5), "bits: got 5; allowed are 4, 6, 8"),
        (lambda: QuantSpec(bits=4, granularity="group"), "give a group_size exactly when"),
        (lambda: QuantSpec(bits=4, group_size=64), "give a group_size exactly when"),
        (lambda: QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False), "must be symmetric"),
        (lambda: QuantSpec(bits=4, dynamic=True), 'only "token" or "tensor" ranges are dynamic'),
        (lambda: TransformSpec(kind="smooth", alpha=1.5), "alpha: got 1.5; allowed is 0 to 1"),
        (lambda: TransformSpec(kind="hadamard", block=48), "block: got 48; allowed are powers of two"),
        (lambda: TimeGroupSpec(count=0), "groups: got 0; allowed is 1 to 1000"),
        (lambda: TimeGroupSpec(kind="edges", edges=(float("nan"),)), "give rising timesteps"),
        (lambda: TimeGroupSpec(kind="edges"), "give rising timesteps between 0 and 1000"),
        (lambda: TimeGroupSpec(kind="edges", edges=(500.0, 250.0)), "give rising timesteps"),
        (lambda: LayerRule(weight=QuantSpec(bits=8)), "weight and activation are quantized together"),
        (
            lambda: LayerRule(transforms=(TransformSpec(kind="hadamard"), TransformSpec(kind="smooth"))),
            "got hadamard > smooth; the order is smooth > greedy_rotation > serpentine",
        ),
        (lambda: run_spec(steps=1), "steps: got 1; allowed is 2 to 200"),
        (lambda: run_spec(guidance=0.5), "guidance: got 0.5; allowed is 1"),
        (lambda: run_spec(seed=-1), "seed: got -1"),
        (lambda: run_spec(prompts=("",)), "prompt: it is empty"),
        (lambda: run_spec(prompts=("x" * 10_000,)), "got 10,000 characters; allowed are at most 500"),
        (
            lambda: run_spec(steps=4, recipes=(make_recipe("tr-dq", groups=8),)),
            "got 8 timestep groups for 4 steps in tr-dq-w8a8; use at most as many groups as steps",
        ),
    ],
)
def test_bad_values_are_refused_in_words(make: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make()


def test_every_kind_of_group_is_counted_its_own_way() -> None:
    four_edges = make_recipe("tr-dq", group_kind="edges", edges=(100.0, 300.0, 500.0, 700.0))
    assert four_edges.time.groups_in(20) == 5
    with pytest.raises(RecipeError, match="got 5 timestep groups for 4 steps"):
        run_spec(steps=4, recipes=(four_edges,))
    one_a_step = make_recipe("tr-dq", groups=50, group_kind="per_step")  # the count is that of another kind: ignored
    assert run_spec(steps=4, recipes=(one_a_step,)).recipes[0].time.groups_in(4) == 4


def test_prompts_are_trimmed() -> None:
    assert check_prompt("  red apple ") == "red apple"
