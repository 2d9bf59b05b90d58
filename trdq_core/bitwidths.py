"""Bit-widths as people write them: W4A8 is weights of 4 bits and activations of 8. No torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from trdq_core.errors import RecipeError
from trdq_core.specs import LayerRule, Recipe

DEFAULT_BITS = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A4")
_WRITTEN = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)
_NAMED = re.compile(r"(.+)-(w\d+a\d+)((?:[+-].*)?)", re.IGNORECASE)


def parse_bits(text: str, flag: str = "bits") -> tuple[str, ...]:
    """Labels such as ("W8A8", "W4A4") of "w8a8,w4a4"; RecipeError if one is not written so or comes twice."""
    labels = tuple(part.strip().upper() for part in text.split(","))
    for label in labels:
        if not _WRITTEN.fullmatch(label):
            raise RecipeError(
                f"{flag}: got {label!r}; write weight and activation bits, such as W4A8, with commas between."
            )
        if labels.count(label) > 1:
            raise RecipeError(f"{flag}: {label} is named twice; name each bit-width once.")
    return labels


def with_each_of(names: Sequence[str], bits: Sequence[str]) -> list[str]:
    """Recipe names with bits: one that has none is repeated with each of `bits`; "fp", peers and names with bits stay."""
    return [
        full
        for name in (part.strip() for part in names)
        for full in (
            [name]
            if not name or name.lower() == "fp" or name.lower().startswith("peer") or _NAMED.fullmatch(name)
            else [f"{name}-{label.lower()}" for label in bits]
        )
    ]


def split_name(name: str) -> tuple[str, str | None]:
    """Method and bit label of a recipe's name: "tr-dq-w4a8" is ("tr-dq", "W4A8"), "mine" is ("mine", None).

    What follows the bits belongs to the method: "tr-dq-w4a8+sharing" is ("tr-dq+sharing", "W4A8").
    """
    found = _NAMED.fullmatch(name)
    return (found[1] + found[3], found[2].upper()) if found else (name, None)


def at_bits(recipe: Recipe, label: str) -> Recipe:
    """`recipe` with every quantized layer at the bits of `label`, such as "W4A8", under a name that ends in them.

    What a rule leaves in floating point stays so: weight-only rules take the bits of weights alone.
    """
    found = _WRITTEN.fullmatch(label)
    if found is None:
        raise RecipeError(f"bits: got {label!r}; write weight and activation bits, such as W4A8.")
    weight, activation = map(int, found.groups())

    def changed(rule: LayerRule) -> LayerRule:
        if rule.weight is None:
            return rule
        seen = rule.activation and dataclasses.replace(rule.activation, bits=activation)
        return dataclasses.replace(rule, weight=dataclasses.replace(rule.weight, bits=weight), activation=seen)

    name = f"{split_name(recipe.name)[0]}-{label.lower()}"
    return dataclasses.replace(recipe, name=name, rules=tuple(changed(rule) for rule in recipe.rules))


def bits_of(recipe: Recipe) -> str:
    """The bit label of a recipe: of its name, else of its rules; "mixed" where they differ, A16 for weights alone."""
    named = split_name(recipe.name)[1]
    if named is not None:
        return named
    labels = {
        f"W{rule.weight.bits}A{rule.activation.bits if rule.activation else 16}"
        for rule in recipe.rules
        if rule.weight is not None
    }
    return labels.pop() if len(labels) == 1 else "mixed" if labels else "FP"
