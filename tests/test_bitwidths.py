"""Bit-widths as people write them."""

from __future__ import annotations

import pytest

from trdq_core.bitwidths import bits_of, parse_bits, split_name, with_each_of
from trdq_core.errors import RecipeError
from trdq_core.presets import make_recipe
from trdq_core.specs import LayerRule, QuantSpec, Recipe


def test_labels_are_read_in_any_case() -> None:
    assert parse_bits("w8a8, W4A16") == ("W8A8", "W4A16")


@pytest.mark.parametrize("text", ["W5X", "", "W4", "4,8", "W4A8,"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--bits: got .*such as W4A8"):
        parse_bits(text, "--bits")
    with pytest.raises(RecipeError, match="W4A8 is named twice"):
        parse_bits("W4A8,w4a8")


def test_names_without_bits_get_each() -> None:
    names = with_each_of(["fp", "rtn", "tr-dq-w4a4", ""], ["W8A8", "W3A4"])
    assert names == ["fp", "rtn-w8a8", "rtn-w3a4", "tr-dq-w4a4", ""]


def test_names_are_taken_apart() -> None:
    assert split_name("tr-dq-w4a8") == ("tr-dq", "W4A8")
    assert split_name("tr-dq-w4a8+sharing") == ("tr-dq+sharing", "W4A8")
    assert split_name("mine") == ("mine", None)


def test_bits_of_a_recipe_without_a_telling_name() -> None:
    four, eight = (
        LayerRule(weight=QuantSpec(bits=b), activation=make_recipe("rtn").rules[0].activation) for b in (4, 8)
    )
    assert bits_of(make_recipe("rtn", weight_bits=4)) == "W4A8"
    assert bits_of(Recipe(name="mine", rules=(four,))) == "W4A8"
    assert bits_of(Recipe(name="mine", rules=(four, eight))) == "mixed"
    assert bits_of(Recipe(name="mine", rules=(LayerRule(weight=QuantSpec(bits=4)),))) == "W4A16"
    assert bits_of(Recipe(name="mine")) == "FP"
