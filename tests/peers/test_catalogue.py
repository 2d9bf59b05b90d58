"""The list of other tools: names, what they quantize, what is missing, and that naming them imports none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from trdq_core.arguments import build_parser, spec_from
from trdq_core.errors import RecipeError
from trdq_core.presets import PEERS, QUANTIZED_ROLES, find_peer, missing, parse_recipe, peer_recipe
from trdq_core.presets import peers as catalogue
from trdq_core.runs import plan
from trdq_core.specs import AttentionSpec, Recipe, SharingSpec

PACKAGES = ("torchao", "sdnq", "optimum", "bitsandbytes", "openvino", "nncf")


def test_a_peer_is_named_like_a_recipe() -> None:
    recipe = parse_recipe("peer-torchao-int8")
    assert (recipe.name, recipe.peer) == ("peer-torchao-int8", "torchao-int8")
    assert parse_recipe(" Peer:torchao-int8 ") == recipe
    assert recipe.quantized
    assert not recipe.fitted
    assert recipe.rules[0].roles == QUANTIZED_ROLES
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_all_means_every_linear() -> None:
    assert peer_recipe("openvino-int8-all").rules[0].roles == ()
    assert find_peer("openvino-int8-all") is PEERS["openvino-int8"]
    with pytest.raises(RecipeError, match="quantizes nothing, leave -all out"):
        peer_recipe("torch-compile-all")


def test_every_peer_has_a_recipe_and_a_module(root: Path) -> None:
    for name, peer in PEERS.items():
        assert peer_recipe(name).quantized == (peer.weight_bits is not None)
        assert (root / "trdq_core" / "peers" / f"{peer.tool}.py").exists()
        assert set(peer.packages) <= set(catalogue.REQUIREMENTS)


def test_an_unknown_peer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean peer-torchao-int8"):
        parse_recipe("peer-torchao-int")


@pytest.mark.parametrize(
    "part", [{"sharing": SharingSpec(blocks=((0,),))}, {"attention": AttentionSpec()}, {"rules": "rotated"}]
)
def test_a_peer_takes_nothing_of_ours(part: dict) -> None:
    if part.get("rules"):
        part = {"rules": parse_recipe("tr-dq-w8a8").rules}
    with pytest.raises(RecipeError, match="the tool torchao-int8 decides how it quantizes"):
        Recipe(name="mine", peer="torchao-int8", **part)


def test_a_plan_of_a_peer_is_refused() -> None:
    with pytest.raises(RecipeError, match="another tool makes its own plan"):
        plan("random-dit", parse_recipe("peer-torchao-int8"))


def test_evaluate_takes_a_peer_as_it_is_named() -> None:
    given = vars(build_parser().parse_args(["evaluate", "--recipes", "rtn,peer-sdnq-int8", "--bits", "W8A8,W4A8"]))
    assert [recipe.name for recipe in spec_from(given).recipes] == ["rtn-w8a8", "rtn-w4a8", "peer-sdnq-int8"]


def test_sharing_is_added_to_recipes_alone(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(SharingSpec(blocks=((0,),)).to_json())
    words = ["compare", "--recipes", "rtn,peer-torchao-int8", "--sharing", str(file)]
    names = [recipe.name for recipe in spec_from(vars(build_parser().parse_args(words))).recipes]
    assert names == ["rtn-w8a8", "rtn-w8a8+sharing", "peer-torchao-int8"]


def test_what_is_missing_comes_with_the_line_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_installed", lambda package: package != "nncf")
    assert missing(PEERS["openvino-fp32"]) is None
    assert missing(PEERS["openvino-int8"]) == 'nncf is not installed; pip install "nncf>=3.4,<4"'
    monkeypatch.setattr(catalogue, "_installed", lambda package: False)
    assert missing(PEERS["openvino-int8"]).startswith("openvino and nncf are not installed; pip install ")
    assert missing(PEERS["torch-compile"]) is None


def test_the_requirements_file_names_the_same_packages(root: Path) -> None:
    lines = (root / "requirements-peers.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == list(catalogue.REQUIREMENTS.values())
    for file in ("requirements.txt", "requirements-test.txt"):
        names = (root / file).read_text()
        assert not any(package in names for package in PACKAGES)


def test_nothing_of_them_is_imported_before_a_peer_runs(root: Path) -> None:
    """Their imports stand inside functions, so that a machine without them, or in a hurry, never meets them."""
    importing = []
    for path in (root / "trdq_core").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing += [f"{path.name}: {name}" for name in names if name.partition(".")[0] in PACKAGES]
    assert not importing
