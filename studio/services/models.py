"""Models and plans for the page and its named endpoints. Only listed names are ever passed on: the core also takes paths."""

from __future__ import annotations

import logging
from html import escape
from typing import Any

from studio.services.core import Core
from trdq_core import local_models
from trdq_core.errors import ModelError, RecipeError, TRDQError
from trdq_core.presets import parse_recipe

log = logging.getLogger(__name__)


def choices(core: Core) -> list[tuple[str, str]]:
    """The models that can be used, for a dropdown."""
    try:
        return [(info.name, info.name) for info in core.runs.models() if info.available]
    except (TRDQError, ImportError) as error:
        log.warning("No models could be listed: %s", error)
        return []


def use_root(folder: str) -> str:
    """List the diffusers folders in `folder`, too; the sentence to show where it is none, else empty."""
    try:
        local_models.use_root(folder)
    except ModelError as error:
        return str(error)
    return ""


def check(core: Core, name: str) -> Any:
    """The listed model with this name; ModelError if there is none or it cannot be used. Paths are never taken."""
    known = {info.name: info for info in core.runs.models()}
    info = known.get(name)
    if info is None:
        usable = ", ".join(known) or "none"
        raise ModelError(f"model: got {name[:80]!r}; the models here are {usable}.")
    if not info.available:
        raise ModelError(f"model {name}: not available, {info.reason}.")
    return info


def kind(core: Core, name: Any) -> str:
    """What a listed model makes: "image", "video", or "speed" for random weights; empty for any other name."""
    return next((str(info.kind) for info in core.runs.models() if info.name == name), "")


def line(core: Core, name: str | None) -> str:
    """One line on the chosen model, or why none can be chosen."""
    known = core.runs.models()
    chosen = next((info for info in known if info.name == name), None)
    absent = [
        info for info in known if not info.available and info.source != "hub"
    ]  # the hub's have a list of their own
    reasons = "; ".join(f"{info.name}: {info.reason}" for info in absent)
    usable = chosen is not None and chosen.available
    text = f"{chosen.description}{_of_the_hub(chosen)}" if usable else ""
    if reasons:
        text = f"{text} Not available: {reasons}."
    return f'<p class="tr-small">{escape(text.strip())}</p>' + (memory(core, chosen.name) if usable else "")


def memory(core: Core, name: str) -> str:
    """What a listed model needs in memory and what is free, before it is loaded; a warning where it does not fit."""
    try:
        found = core.runs.preflight(name, "cuda" if core.gpu_name() else "cpu")
    except TRDQError as error:
        return html_line(str(error), "tr-notice warning")
    if found is None:
        return ""
    said = found.sentence()
    return html_line(said[0].upper() + said[1:], "tr-small" if found.fits else "tr-notice warning")


def html_line(text: str, kind: str) -> str:
    """One line of text, escaped."""
    return f'<p class="{kind}">{escape(text)}</p>'


def _of_the_hub(info: Any) -> str:
    return f" {info.repo}, revision {str(info.revision)[:8]}." if info.source == "hub" else ""


def facts(core: Core) -> list[dict[str, Any]]:
    """Names and descriptions; no paths."""
    names = ("name", "kind", "description", "available", "reason", "source", "repo", "revision")
    return [{name: getattr(info, name) for name in names} for info in core.runs.models()]


def plan(core: Core, model: str, recipe: str, groups: int) -> dict[str, Any]:
    """The plan as JSON values; TRDQError if there is none."""
    if type(groups) is not int:
        raise RecipeError(f"groups: got {groups!r}; give a whole number.")
    check(core, str(model))
    found = core.runs.plan(str(model), parse_recipe(str(recipe), groups=groups))
    return dict(found._asdict(), layers=[layer._asdict() for layer in found.layers])
