"""Specifications: JSON both ways, and every refusal one plain sentence."""

from __future__ import annotations

import dataclasses
import json

import pytest

from trdq_core.errors import RecipeError
from trdq_core.presets import make_recipe
from trdq_core.specs import (
    AttentionSpec,
    LayerRule,
    LowRankSpec,
    QuantSpec,
    Recipe,
    ReconstructionSpec,
    RunSpec,
    SharingSpec,
    TimeGroupSpec,
    TransformSpec,
    check_prompt,
)

SEARCHED = QuantSpec(bits=4, granularity="tensor", range="output")
LEARNED = LayerRule(weight=QuantSpec(bits=4), rounding="adaround")


def activation(*transforms: TransformSpec, **changes: object) -> LayerRule:
    """A rule with 4-bit weights and an activation grid as given."""
    return LayerRule(weight=QuantSpec(bits=4), activation=QuantSpec(**changes), transforms=transforms)


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
    with pytest.raises(RecipeError, match="QuantSpec: unknown key 'bit'; allowed keys are bits, grid, symmetric"):
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
        ('{"name": "x", "format_version": 99}', "got 99; this version reads up to 2"),
    ],
)
def test_damaged_recipes_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantSpec(bits=7), "bits: got 7; allowed are 2, 3, 4, 5, 6, 8"),
        (lambda: QuantSpec(bits=4, granularity="group"), "give a group_size exactly when"),
        (lambda: QuantSpec(bits=4, group_size=64), "give a group_size exactly when"),
        (lambda: QuantSpec(bits=4, dynamic=True), 'only "token", "group" or "tensor" ranges are dynamic'),
        (lambda: QuantSpec(bits=4, clip=0), "clip: got 0; allowed is 0.1 to 1"),
        (lambda: QuantSpec(bits=4, grid="twin_log", granularity="tensor"), "one grid for each output channel"),
        (lambda: QuantSpec(bits=4, grid="twin_region"), "it is static, with one grid for a whole tensor"),
        (lambda: QuantSpec(bits=4, per_time_group=True), "only static activation ranges"),
        (lambda: activation(bits=2, granularity="token", dynamic=True), "activation bits: got 2; allowed are 3, 4, 5"),
        (lambda: activation(bits=4, grid="twin_log"), 'grid "twin_log" is for weights'),
        (lambda: activation(bits=4, granularity="channel"), "per token, per group or per tensor, not per channel"),
        (lambda: activation(bits=4, granularity="token"), "got static per token"),
        (lambda: activation(bits=4, granularity="token", dynamic=True, range="ema"), 'take range "minmax" or "mse"'),
        (
            lambda: activation(TransformSpec(kind="smooth"), bits=8, grid="twin_region", granularity="tensor"),
            "leave the transforms out",
        ),
        (lambda: LayerRule(weight=QuantSpec(bits=4, granularity="token")), "weights are fixed"),
        (lambda: LayerRule(weight=QuantSpec(bits=4, granularity="tensor", grid="twin_region")), "is for activations"),
        (lambda: LayerRule(rounding="gptq"), "it quantizes no weight"),
        (lambda: LowRankSpec(rank=0), "rank: got 0; allowed is 1 to 1024"),
        (lambda: AttentionSpec(bits=2), "attention bits: got 2"),
        (lambda: AttentionSpec(per_time_group=True), "whose threshold then moves"),
        (lambda: AttentionSpec(live=True, bits=6), "attention live: got 6 bits and 8-bit uniform softmax"),
        (lambda: AttentionSpec(live=True, softmax_grid="twin_region"), "the kernel takes bits 8"),
        (lambda: ReconstructionSpec(beta=(2.0, 20.0)), "give two numbers, the first larger"),
        (
            lambda: LayerRule(weight=SEARCHED, rounding="gptq"),
            'weight range "output" searches .* got it with rounding "gptq"',
        ),
        (lambda: LayerRule(weight=SEARCHED, rounding="adaround"), 'got it with rounding "adaround"'),
        (lambda: LayerRule(weight=SEARCHED, low_rank=LowRankSpec()), "got it with low_rank; leave that out"),
        (
            lambda: LayerRule(
                match="*.ff.*",
                weight=QuantSpec(bits=4),
                rounding="gptq",
                activation=QuantSpec(bits=4, granularity="tensor", range="output"),
            ),
            r'rule "\*\.ff\.\*": activation range "output"',
        ),
        (lambda: Recipe(name="x", reconstruction=ReconstructionSpec()), "learns the rounding"),
        (
            lambda: Recipe(name="x", rules=(LEARNED,)),
            'x: rounding "adaround" is learnt by a reconstruction, and there is none',
        ),
        (lambda: Recipe(name="x", attention=AttentionSpec()), "x: attention products are quantized beside linears"),
        (lambda: Recipe(name="x", rules=(LEARNED,), storage="resident"), 'use storage "shared"'),
        (
            lambda: Recipe(name="x", attention=AttentionSpec(), sharing=SharingSpec(blocks=((0,),))),
            "either quantized or shared",
        ),
        (lambda: TransformSpec(kind="smooth", alpha=1.5), "alpha: got 1.5; allowed is 0 to 1"),
        (lambda: TransformSpec(kind="hadamard", block=48), "block: got 48; allowed are powers of two"),
        (lambda: TimeGroupSpec(count=0), "groups: got 0; allowed is 1 to 1000"),
        (lambda: TimeGroupSpec(kind="edges", edges=(float("nan"),)), "give rising timesteps"),
        (lambda: TimeGroupSpec(kind="edges"), "give rising timesteps between 0 and 1000"),
        (lambda: TimeGroupSpec(kind="edges", edges=(500.0, 250.0)), "give rising timesteps"),
        (lambda: LayerRule(activation=QuantSpec(bits=8, granularity="tensor")), "it quantizes no weight; give one"),
        (
            lambda: LayerRule(
                weight=QuantSpec(bits=8), transforms=(TransformSpec(kind="hadamard"), TransformSpec(kind="smooth"))
            ),
            "got hadamard > smooth; the order is smooth > greedy_rotation > serpentine",
        ),
        (
            lambda: LayerRule(
                weight=QuantSpec(bits=8),
                transforms=(TransformSpec(kind="adaptive_rotation"), TransformSpec(kind="hadamard")),
            ),
            "adaptive_rotation chooses the rotation itself",
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


@pytest.mark.parametrize(
    "name", ["../../a", "a/b", "a\\b", "", " ", "a b", "a\n", ".hidden", "-a", "+a", "é", "x" * 101, "a\0b", "C:a"]
)
def test_names_that_files_could_not_be_called_by_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="recipe name: "):
        dataclasses.replace(make_recipe("rtn"), name=name)
    with pytest.raises(RecipeError, match="recipe name: "):
        Recipe.from_dict(make_recipe("rtn").to_dict() | {"name": name})


@pytest.mark.parametrize("name", ["fp", "FP", "fp-again", "Fp-Again"])
def test_the_rows_of_the_reference_are_not_taken_by_a_recipe(name: str) -> None:
    with pytest.raises(
        RecipeError, match=f"recipe name: {name} is the name of the full-precision reference's own rows"
    ):
        dataclasses.replace(make_recipe("rtn"), name=name)
    shared = SharingSpec(blocks=((0,),))
    with pytest.raises(RecipeError, match="reference's own rows"):
        Recipe(name=name, sharing=shared)
    assert Recipe(name="fp").changes is False
    with pytest.raises(RecipeError, match="reference's own rows"):
        Recipe(name="fp-again")


@pytest.mark.parametrize(
    "name", ["tr-dq-w8a8+sharing", "tr-dq-w8a8-every-rotation", "tr-dq-w8a8-4-groups", "fp+sharing", "rtn-120000-bytes"]
)
def test_names_of_the_projects_own_recipes_are_allowed(name: str) -> None:
    assert Recipe.from_json(dataclasses.replace(make_recipe("rtn"), name=name).to_json()).name == name


@pytest.mark.parametrize("again", ["mine", "Mine"])
def test_recipes_of_a_run_have_names_of_their_own(again: str) -> None:
    first, second = (dataclasses.replace(make_recipe("rtn"), name=name) for name in ("mine", again))
    with pytest.raises(RecipeError, match="recipes: mine is named twice; each recipe of a run needs a name of its own"):
        run_spec(recipes=(first, second))


def test_every_kind_of_group_is_counted_its_own_way() -> None:
    four_edges = make_recipe("tr-dq", group_kind="edges", edges=(100.0, 300.0, 500.0, 700.0))
    assert four_edges.time.groups_in(20) == 5
    with pytest.raises(RecipeError, match="got 5 timestep groups for 4 steps"):
        run_spec(steps=4, recipes=(four_edges,))
    one_a_step = make_recipe("tr-dq", groups=50, group_kind="per_step")  # the count is that of another kind: ignored
    assert run_spec(steps=4, recipes=(one_a_step,)).recipes[0].time.groups_in(4) == 4


def test_prompts_are_trimmed() -> None:
    assert check_prompt("  red apple ") == "red apple"
