"""What recipes of a run are called on the page, which of them get a column, and in which colour."""

from __future__ import annotations

from typing import Any

from studio import plots
from studio.services.methods import split_name, title_of_method
from studio.services.peers import is_peer, title_of_peer, version_of
from studio.services.sharing import SUFFIX
from studio.services.stored import StoredRun

ROLES = ("reference", "baseline", "chosen")


def line_colours(names: list[str]) -> dict[str, str]:
    """A colour for each recipe: those of the columns, others of their own; a recipe with sharing has that of its base."""
    bases = list(dict.fromkeys(name.removesuffix(SUFFIX) for name in names))
    shown = column_names(bases)
    colours = dict(zip(shown, plots.COLUMN_COLOURS, strict=False))
    others = (name for name in bases if name not in colours)
    colours |= {name: plots.OTHERS[index % len(plots.OTHERS)] for index, name in enumerate(others)}
    return {name: colours[name.removesuffix(SUFFIX)] for name in names}


def column_names(names: list[str]) -> list[str]:
    """The recipes that get a column: the first, the second and the last; with sharing the first and the last pair."""
    if len(names) <= len(ROLES):
        return names
    pair = names[-1].removesuffix(SUFFIX)
    return [names[0], pair if pair in names[1:-1] else names[1], names[-1]]


def title_of(name: str, facts: dict[str, Any]) -> str:
    """ "TR-DQ W4A8" for "tr-dq-w4a8"; the report's label for the reference."""
    if name.endswith(SUFFIX):
        return f"{title_of(name.removesuffix(SUFFIX), facts)} + sharing"
    if is_peer(name):
        return title_of_peer(name)
    if name == "fp":
        return str(facts.get("label") or "Full precision")
    method, bits = split_name(name)
    return f"{title_of_method(method)} {bits}" if bits else name


def under(name: str, facts: dict[str, Any], run: StoredRun) -> str:
    """The line under a column's title."""
    if facts.get("kind") == "reference":
        reference = run.report.get("reference") or {}
        device = str(reference.get("device") or "cpu").upper()
        return f"reference, {reference.get('label', 'full precision')} on the {device}"
    if facts.get("kind") in ("peer", "failed"):
        return f"another tool, {version_of(facts)}".rstrip(", ") if facts["kind"] == "peer" else "left out"
    recipe = next((recipe for recipe in run.spec.recipes if recipe.name == name), None) if run.spec else None
    if recipe is not None and not recipe.quantized:
        return "full precision with attention sharing"
    if recipe is None or (recipe.time.count == 1 and recipe.time.kind == "uniform"):
        return "one transform for all timesteps"
    count = recipe.time.groups_in(run.spec.steps) if run.spec else recipe.time.count
    groups = "a group per step" if recipe.time.kind == "per_step" else f"{count} timestep groups"
    return f"{groups}, {recipe.storage}"
