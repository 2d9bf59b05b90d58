"""Flags and spec files become one RunSpec."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trdq_core import arguments, prompts
from trdq_core.errors import RecipeError
from trdq_core.presets import parse_recipe
from trdq_core.specs import LayerRule, RunSpec, SharingSpec


def spec_of(*words: str) -> RunSpec:
    """The run that a command line asks for."""
    return arguments.spec_from(vars(arguments.build_parser().parse_args(words)))


def test_the_line_of_the_readme() -> None:
    spec = spec_of(
        *"compare --model pocket-image --recipes fp,rtn-w4a8,tr-dq-w4a8 --groups 4 --prompts 8 --seed 0".split()
    )
    assert [recipe.name for recipe in spec.recipes] == ["fp", "rtn-w4a8", "tr-dq-w4a8"]
    assert [recipe.time.count for recipe in spec.recipes] == [1, 1, 4]
    assert (spec.command, spec.model, spec.seed, len(spec.prompts)) == ("compare", "pocket-image", 0, 8)
    assert len(spec.calibration_prompts) == arguments.CALIBRATION_PROMPTS
    assert not set(spec.prompts) & set(spec.calibration_prompts)


def test_own_prompts_and_numbers() -> None:
    words = [
        "sample",
        "--prompt",
        "red apple",
        "--prompt",
        "owl",
        "--steps",
        "12",
        "--guidance",
        "2",
        "--backend",
        "torch",
    ]
    spec = spec_of(*words)
    assert spec.prompts == ("red apple", "owl")
    assert (spec.steps, spec.guidance, spec.backend) == (12, 2.0, "torch")
    assert [recipe.name for recipe in spec.recipes] == ["fp"]


def test_edges_make_groups() -> None:
    (recipe,) = spec_of("plan", "--recipes", "tr-dq-w4a8", "--edges", "250,500", "--storage", "resident").recipes
    assert (recipe.time.kind, recipe.time.edges, recipe.time.count) == ("edges", (250.0, 500.0), 3)
    assert recipe.storage == "resident"


def test_spec_file_is_a_start_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    asked = RunSpec(
        command="compare", model="random-dit", recipes=(parse_recipe("rtn-w8a8"),), prompts=("owl",), seed=3
    )
    file.write_text(asked.to_json())
    assert spec_of("compare", "--spec", str(file)) == asked
    changed = spec_of("profile", "--spec", str(file), "--seed", "5", "--recipes", "smoothquant-w4a8")
    assert (changed.command, changed.model, changed.seed, changed.prompts) == ("profile", "random-dit", 5, ("owl",))
    assert [recipe.name for recipe in changed.recipes] == ["smoothquant-w4a8"]


def test_recipe_files_join_the_named_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    mine = parse_recipe("tr-dq-w4a8", groups=2).to_dict() | {"name": "mine"}
    file.write_text(json.dumps(mine))
    spec = spec_of("compare", "--recipes", "fp", "--recipe-file", str(file))
    assert [recipe.name for recipe in spec.recipes] == ["fp", "mine"]
    assert [recipe.name for recipe in spec_of("plan", "--recipe-file", str(file)).recipes] == ["mine"]


def test_two_words_for_one_recipe_are_told_apart() -> None:
    with pytest.raises(RecipeError, match="recipes: rtn and rtn-dynamic are both rtn-w8a8; .* leave one out"):
        spec_of("compare", "--recipes", "rtn,rtn-dynamic")
    with pytest.raises(RecipeError, match="recipes: rtn-w8a8 is named twice"):
        spec_of("compare", "--recipes", "rtn,rtn")


@pytest.mark.parametrize("name", ["../../a", "fp", "fp-again"])
def test_a_recipe_file_has_a_name_that_files_may_have(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(parse_recipe("rtn").to_dict() | {"name": name}))
    with pytest.raises(RecipeError, match="recipe name: "):
        spec_of("compare", "--recipe-file", str(file))


def test_without_a_prompts_file_a_short_list_stands_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(prompts, "PROMPTS_FILE", tmp_path / "none.json")
    assert spec_of("compare", "--prompts", "2").prompts == prompts.FALLBACK_PROMPTS[:2]
    assert "short built-in list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not JSON"),
        ('{"command": "compare", "model": "m", "sed": 1}', "unknown key 'sed'"),
        ("[]", "expected a JSON object"),
    ],
)
def test_spec_files_that_cannot_be_used(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(content)
    with pytest.raises(RecipeError, match=sentence):
        spec_of("compare", "--spec", str(file))


def test_groups_beside_a_spec_file_need_recipes(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(RunSpec(command="compare", model="m", recipes=(parse_recipe("rtn-w8a8"),)).to_json())
    with pytest.raises(RecipeError, match="--groups: the recipes of --spec keep their own groups"):
        spec_of("compare", "--spec", str(file), "--groups", "4")


def test_a_plan_adds_each_recipe_with_sharing(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(SharingSpec(blocks=((0, 1),)).to_json())
    compared = spec_of("compare", "--recipes", "fp,tr-dq-w4a8", "--sharing", str(file))
    names = ["fp", "fp+sharing", "tr-dq-w4a8", "tr-dq-w4a8+sharing"]
    assert [recipe.name for recipe in compared.recipes] == names
    (sampled,) = spec_of("sample", "--recipe", "rtn", "--sharing", str(file)).recipes
    assert sampled.sharing.blocks == ((0, 1),)
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(compared.to_json())
    assert spec_of("compare", "--spec", str(spec_file)) == compared
    with pytest.raises(RecipeError, match="--sharing: the recipes of --spec keep their own sharing"):
        spec_of("compare", "--spec", str(spec_file), "--sharing", str(file))
    file.write_text("{")
    with pytest.raises(RecipeError, match="SharingSpec: not JSON"):
        spec_of("compare", "--sharing", str(file))


def test_the_attention_command_takes_a_threshold() -> None:
    plain = spec_of("attention")
    assert (plain.command, plain.recipes, plain.sharing, len(plain.prompts)) == ("attention", (), None, 4)
    spec = spec_of(*"attention --threshold 0.98 --measure map_cosine --edges 250,500".split())
    assert spec.sharing == SharingSpec(edges=(250.0, 500.0), measure="map_cosine", threshold=0.98)
    with pytest.raises(RecipeError, match="--threshold: it is missing"):
        spec_of("attention", "--edges", "500")
    with pytest.raises(RecipeError, match="guidance: got 1, which has one branch"):
        spec_of("attention", "--guidance", "1")


def test_evaluate_gives_each_bits_to_recipes_without() -> None:
    spec = spec_of(*"evaluate --recipes fp,rtn,tr-dq-w4a4 --bits W8A8,w3a4 --groups 2 --prompts 3 --seeds 2".split())
    assert (spec.command, spec.seeds, len(spec.prompts)) == ("evaluate", 2, 3)
    assert [recipe.name for recipe in spec.recipes] == ["fp", "rtn-w8a8", "rtn-w3a4", "tr-dq-w4a4"]
    assert spec.recipes[-1].time.count == 2
    plain = spec_of("evaluate")
    assert len(plain.recipes) == 2 * 5
    assert (len(plain.prompts), plain.seeds) == (16, 1)


def test_evaluate_takes_recipe_files_and_its_own_spec(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(parse_recipe("rtn-w4a4").to_dict() | {"name": "mine"}))
    spec = spec_of("evaluate", "--recipes", "rtn", "--bits", "W8A8", "--recipe-file", str(file), "--seeds", "3")
    assert [recipe.name for recipe in spec.recipes] == ["rtn-w8a8", "mine"]
    (tmp_path / "spec.json").write_text(spec.to_json())
    assert spec_of("evaluate", "--spec", str(tmp_path / "spec.json")) == spec


def test_sensitivity_has_a_recipe_for_each_of_its_bits(tmp_path: Path) -> None:
    spec = spec_of(*"sensitivity --bits W8A8,W4A4 --method smoothquant --prompts 3".split())
    assert spec.bits == ("W8A8", "W4A4")
    assert [recipe.name for recipe in spec.recipes] == ["smoothquant-w8a8", "smoothquant-w4a4"]
    assert spec.prompts == spec.calibration_prompts[:3], "bits are not chosen on the prompts results are measured on"
    assert [recipe.name for recipe in spec_of("sensitivity").recipes][-1] == "rtn-w3a4"
    (tmp_path / "spec.json").write_text(spec.to_json())
    assert spec_of("sensitivity", "--spec", str(tmp_path / "spec.json")) == spec
    for method in ("fp", "rtn-w4a8", ""):
        with pytest.raises(RecipeError, match="--method: got .* without bits, such as rtn"):
            spec_of("sensitivity", "--method", method)
    with pytest.raises(RecipeError, match="did you mean tr-dq"):
        spec_of("sensitivity", "--method", "tr-dk")


def test_sensitivity_scans_in_time_groups(tmp_path: Path) -> None:
    spec = spec_of(*"sensitivity --bits W8A8,W4A8 --method tr-dq --groups 4 --group-kind dp --storage resident".split())
    assert [(r.time.kind, r.time.count, r.storage) for r in spec.recipes] == [("dp", 4, "resident")] * 2
    assert [r.time.edges for r in spec_of(*"sensitivity --method tr-dq --edges 250,500".split()).recipes] == [
        (250, 500)
    ] * 4
    (tmp_path / "spec.json").write_text(spec.to_json())
    for words in ("sensitivity --groups 2 --spec", "sensitivity --storage shared --spec"):
        with pytest.raises(
            RecipeError, match="the recipes of --spec keep their own groups; name recipes with --method"
        ):
            spec_of(*words.split(), str(tmp_path / "spec.json"))


def test_sensitivity_takes_a_recipe_file_at_each_of_its_bits(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    mine = parse_recipe("tr-dq-plus-w4a4", groups=3)
    mine = dataclasses.replace(mine, name="mine", rules=(LayerRule(match="*.0.*"), *mine.rules))
    file.write_text(mine.to_json())
    spec = spec_of("sensitivity", "--recipe-file", str(file), "--bits", "W8A8,W3A4")
    assert [recipe.name for recipe in spec.recipes] == ["mine-w8a8", "mine-w3a4"]
    for recipe, bits in zip(spec.recipes, ((8, 8), (3, 4)), strict=True):
        assert (recipe.time, recipe.storage, recipe.rules[0]) == (mine.time, mine.storage, mine.rules[0])
        assert (recipe.rules[1].weight.bits, recipe.rules[1].activation.bits) == bits
        assert recipe.rules[1].transforms == mine.rules[1].transforms
    with pytest.raises(RecipeError, match="--method: got it beside --recipe-file"):
        spec_of("sensitivity", "--recipe-file", str(file), "--method", "rtn")
    with pytest.raises(RecipeError, match="--groups: the recipes of --recipe-file keep their own groups"):
        spec_of("sensitivity", "--recipe-file", str(file), "--groups", "4")


def test_attention_plans_by_budgets() -> None:
    def wish(*flags: str) -> SharingSpec:
        return spec_of("attention", *flags).sharing

    assert wish("--psnr", "35") == SharingSpec(target_psnr_db=35.0)
    assert wish("--saving", "0.1", "--store-bytes", "9") == SharingSpec(target_saving=0.1, store_bytes=9)
    assert wish("--step-share", "0.05").target_step_share == 0.05
    assert wish("--save-ms", "1.2", "--step-ms", "24").target_step_share == pytest.approx(0.05)
    late = wish("--across", "0.1", "--skip-below", "250", "--skipped-guidance", "off", "--edges", "500")
    assert late == SharingSpec(
        edges=(500.0,), across_threshold=0.1, skip_unconditional_below=250.0, skipped_guidance="off"
    )
    assert wish("--skip", "0.05").skip_threshold == 0.05


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--store-bytes", "9"), "--threshold: it is missing"),
        (("--measure", "map_cosine", "--psnr", "35"), "--measure: it says what --threshold is a limit of"),
        (("--psnr", "35", "--skipped-guidance", "off"), "--skipped-guidance: nothing is skipped"),
        (("--save-ms", "1"), "--save-ms: it goes with --step-ms"),
        (("--save-ms", "1", "--step-ms", "0"), "--step-ms: got 0; give the time of a step"),
        (("--save-ms", "1", "--step-ms", "9", "--step-share", "0.1"), "--step-share says the same"),
        (("--psnr", "35", "--saving", "0.1"), "one of the four"),
    ],
)
def test_bad_budgets_are_refused_in_words(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        spec_of("attention", *flags)


def test_looking_into_a_layer_takes_a_recipe_and_no_prompts() -> None:
    spec = spec_of(*"activations --recipe tr-dq-w4a8 --groups 4 --layer x --group 2 --calibration ab".split())
    assert (spec.command, spec.recipes[0].time.count, spec.prompts) == ("calibrate", 4, ())


def test_memory_is_passed_over_only_where_it_is_said() -> None:
    assert not spec_of("compare").anyway
    assert spec_of("compare", "--anyway").anyway


def test_precision_and_offload_are_those_that_were_asked_for() -> None:
    assert spec_of("compare").loading == ("auto", "none")
    assert spec_of(*"plan --dtype bf16".split()).loading == ("bf16", "none")
    assert spec_of(*"save --dtype fp16 --offload sequential".split()).loading == ("fp16", "sequential")
    assert RunSpec.from_json(spec_of(*"sample --dtype bf16".split()).to_json()).dtype == "bf16"


def test_sizes_are_those_that_were_asked_for() -> None:
    assert spec_of("compare").size == {}
    assert spec_of("sample", "--height", "64", "--frames", "8").size == {"height": 64, "frames": 8}
    with pytest.raises(RecipeError, match="width: got 0; allowed is 1 to 8192"):
        spec_of("sample", "--width", "0")


def test_a_lora_is_named_by_its_place_and_a_scale_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = spec_of(*"sample --lora style.safetensors --lora-scale 0.5".split())
    assert (spec.lora, spec.lora_scale) == (str(tmp_path / "style.safetensors"), 0.5)
    assert RunSpec.from_json(spec.to_json()) == spec
    for words, said in (
        ("--lora-scale 0.5", "name its file with --lora"),
        ("--lora a --lora-scale nan", "give a number"),
    ):
        with pytest.raises(RecipeError, match=said):
            spec_of("sample", *words.split())
