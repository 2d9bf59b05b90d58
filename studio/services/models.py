"""Models and plans for the page and its named endpoints. Only listed names are ever passed on: the core also takes paths."""

from __future__ import annotations

import logging
from html import escape
from typing import Any

from studio.services.core import Core
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
    reasons = "; ".join(f"{info.name}: {info.reason}" for info in known if not info.available)
    text = chosen.description if chosen is not None and chosen.available else ""
    if reasons:
        text = f"{text} Not available: {reasons}."
    return f'<p class="tr-small">{escape(text.strip())}</p>'


def facts(core: Core) -> list[dict[str, Any]]:
    """Names and descriptions; no paths."""
    names = ("name", "kind", "description", "available", "reason")
    return [{name: getattr(info, name) for name in names} for info in core.runs.models()]


def plan(core: Core, model: str, recipe: str, groups: int) -> dict[str, Any]:
    """The plan as JSON values; TRDQError if there is none."""
    if type(groups) is not int:
        raise RecipeError(f"groups: got {groups!r}; give a whole number.")
    check(core, str(model))
    found = core.runs.plan(str(model), parse_recipe(str(recipe), groups=groups))
    return dict(found._asdict(), layers=[layer._asdict() for layer in found.layers])
