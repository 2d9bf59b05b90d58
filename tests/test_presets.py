"""Named recipes."""

from __future__ import annotations

import pytest

from trdq_core.errors import RecipeError
from trdq_core.presets import METHODS, OFFERED_BITS, QUANTIZED_ROLES, make_recipe, parse_recipe
from trdq_core.specs import Recipe


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fp"])
@pytest.mark.parametrize("bits", OFFERED_BITS)
def test_every_method_exists_at_every_offered_width(method: str, bits: str) -> None:
    recipe = parse_recipe(f"{method}-{bits}", groups=4)
    assert recipe.name == f"{method}-{bits.lower()}"
    for rule in recipe.rules:
        assert (rule.weight.bits, rule.activation.bits) == (int(bits[1]), int(bits[3]))
    covered = {role for rule in recipe.rules if rule.match == "*" for role in rule.roles}
    assert covered >= set(QUANTIZED_ROLES)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.description
    assert recipe.source


def test_only_time_grouped_methods_take_groups() -> None:
    assert make_recipe("tr-dq", groups=4).time.count == 4
    assert make_recipe("rtn", groups=4).time.count == 1
    assert make_recipe("tr-dq", groups=4).storage == "switched"
    assert make_recipe("tr-dq", groups=1).storage == "shared"
    assert make_recipe("tr-dq", groups=4, storage="resident").storage == "resident"


def test_invariant_33_methods_differ_only_in_their_pieces() -> None:
    """Leaving the transforms out reduces every method to round-to-nearest."""
    import dataclasses

    rtn = make_recipe("rtn", weight_bits=4, activation_bits=8).rules[0]
    for method in ("smoothquant", "vidit-q", "tr-dq"):
        rule = make_recipe(method, weight_bits=4, activation_bits=8).rules[0]
        assert dataclasses.replace(rule, transforms=()) == rtn


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tr-dk-w4a8", "got 'tr-dk'; known methods are fp, rtn, .* did you mean tr-dq"),
        ("rtn-w7a8", "weight bits: got 7; allowed are 2, 3, 4, 5, 6, 8"),
        ("rtn-w8a2", "activation bits: got 2"),
        ("", "the name is empty"),
    ],
)
def test_unknown_names_are_refused_in_words(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(name)
