"""The methods as the page lists them: what each does, where it is from, how it computes and what it asks of a calibration."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from studio.services import peers
from trdq_core.bitwidths import split_name
from trdq_core.errors import RecipeError
from trdq_core.presets import METHODS, make_recipe
from trdq_core.specs import Recipe

__all__ = [
    "METHOD_TITLES", "SAVED_PREFIX", "MethodFacts", "all_facts", "baseline_choices", "calibration_words", "chosen_facts",
    "facts_of", "facts_of_saved", "is_simulated", "link_of", "method_choices", "saved_choices",
    "saved_name", "split_name", "title_of_method",
]  # fmt: skip

METHOD_TITLES = {
    "fp": "Full precision",
    "rtn": "RTN",
    "rtn-mse": "RTN MSE",
    "rtn-static": "RTN static",
    "smoothquant": "SmoothQuant",
    "quarot": "QuaRot",
    "duquant": "DuQuant",
    "svdquant": "SVDQuant",
    "q-dit": "Q-DiT",
    "q-diffusion": "Q-Diffusion",
    "ptq4dit": "PTQ4DiT",
    "tfmq-dm": "TFMQ-DM",
    "tq-dit": "TQ-DiT",
    "lrq-dit": "LRQ-DiT",
    "vidit-q": "ViDiT-Q",
    "tr-dq-release-pixart": "TR-DQ released, PixArt",
    "tr-dq-release-opensora": "TR-DQ released, OpenSora",
    "tr-dq": "TR-DQ",
    "tr-dq-int8-attention": "TR-DQ, int8 attention",
    "tr-dq-plus": "TR-DQ plus",
    "tr-dq-plus-low-rank": "TR-DQ plus, low rank",
}
SAVED_PREFIX = "saved:"  # before the name of a recipe of the visitor's own, where a method is chosen
SECOND_PASS_RANGES = ("minmax", "ema", "percentile")  # static ranges that every calibrated value has a part in


class MethodFacts(NamedTuple):
    """One method at given bits, for a line of the list."""

    name: str
    title: str
    description: str
    source: str
    link: str  # empty where there is nothing to link
    simulated: bool
    calibration: str


def title_of_method(name: str) -> str:
    """ "TR-DQ" for "tr-dq"; a name that is no method's stays as it is."""
    return METHOD_TITLES.get(name, name)


def saved_name(method: Any) -> str | None:
    """The name of a saved recipe where one is chosen in place of a method."""
    text = str(method)
    return text.removeprefix(SAVED_PREFIX) if text.startswith(SAVED_PREFIX) else None


def method_choices(saved: tuple[Recipe, ...] = ()) -> list[tuple[str, str]]:
    """Every method for a dropdown, ours first, then the saved recipes; what is simulated at any offered bits says so."""
    names = [name for name in reversed(METHODS) if name != "fp"]
    return [(_label(name), name) for name in names] + saved_choices(saved)


def baseline_choices(saved: tuple[Recipe, ...] = ()) -> list[tuple[str, str]]:
    """The same, the simplest first, and behind them the other tools that are installed."""
    return [(_label(name), name) for name in METHODS if name != "fp"] + saved_choices(saved) + peers.choices()


def is_simulated(recipe: Recipe) -> bool:
    """Whether no integer kernel takes some of the recipe's grids, so that it is computed in floating point."""
    return recipe.simulated_attention or any(rule.weight is not None and not rule.integer for rule in recipe.rules)


def calibration_words(recipe: Recipe) -> str:
    """What a recipe asks for beyond the statistics that all recipes share."""
    if recipe.reconstruction is not None:
        return "learns rounding (minutes)"
    quantizers = [spec for rule in recipe.rules for spec in (rule.weight, rule.activation) if spec is not None]
    static = any(
        rule.activation is not None and not rule.activation.dynamic and rule.activation.range in SECOND_PASS_RANGES
        for rule in recipe.rules
    )
    if static or recipe.simulated_attention or any(spec.range == "output" for spec in quantizers):
        return "second pass"
    return "none"


def facts_of(name: str, weight_bits: int, activation_bits: int) -> MethodFacts:
    """One method at these bits; RecipeError if there is no such method or the bits are not allowed."""
    recipe = make_recipe(name, weight_bits=weight_bits, activation_bits=activation_bits)
    method = METHODS[name]
    return MethodFacts(
        name, title_of_method(name), method.description, method.source, link_of(method.source),
        is_simulated(recipe), calibration_words(recipe),
    )  # fmt: skip


def all_facts(weight_bits: Any, activation_bits: Any) -> list[MethodFacts]:
    """Every method that quantizes, at these bits."""
    return [facts_of(name, weight_bits, activation_bits) for name in METHODS if name != "fp"]


def facts_of_saved(recipe: Recipe) -> MethodFacts:
    """A recipe of the visitor's own."""
    description = f"{recipe.description} It has its own bits and time groups.".strip()
    return MethodFacts(
        recipe.name, recipe.name, description, "saved recipe", "", is_simulated(recipe), calibration_words(recipe)
    )


def chosen_facts(method: Any, weight_bits: Any, activation_bits: Any, saved: tuple[Recipe, ...]) -> MethodFacts | None:
    """The method or saved recipe that a dropdown holds; nothing if it holds none, or bits that are not allowed."""
    name = saved_name(method)
    if name is not None:
        recipe = next((recipe for recipe in saved if recipe.name == name), None)
        return facts_of_saved(recipe) if recipe is not None else None
    try:
        return facts_of(str(method), weight_bits, activation_bits) if method in METHODS else None
    except RecipeError:
        return None


def link_of(source: str) -> str:
    """The address of a paper on arXiv; empty for any other source."""
    found = re.fullmatch(r"arXiv (\d{4}\.\d{4,5})", source)
    return f"https://arxiv.org/abs/{found[1]}" if found else ""


def _label(name: str) -> str:
    simulated = is_simulated(make_recipe(name, weight_bits=8, activation_bits=8))
    return f"{title_of_method(name)} (simulated)" if simulated else title_of_method(name)


def saved_choices(saved: tuple[Recipe, ...]) -> list[tuple[str, str]]:
    """The saved recipes for a dropdown."""
    return [(f"{recipe.name} (saved recipe)", SAVED_PREFIX + recipe.name) for recipe in saved]
