"""Comparisons asked for by scripts over the network: the run they mean, and what they get back."""

from __future__ import annotations

import base64
import io
from typing import Any

from studio.jobs import Event
from studio.services import models
from studio.services.core import Core
from studio.services.form import Form, run_spec, whole
from studio.services.stored import StoredRun
from trdq_core.errors import RecipeError
from trdq_core.presets import parse_recipe
from trdq_core.specs import RunSpec, check_prompt

MOST_RECIPES = 6
TOLD = ("stage", "label", "recipe", "done", "total", "eta_seconds", "detail")


def comparison(core: Core, model: Any, recipes: Any, prompt: Any, form: Form, groups: Any) -> RunSpec:
    """The comparison of recipes named with commas, such as "rtn-w4a8,tr-dq-w4a8", on one prompt; TRDQError if it is none."""
    info = models.check(core, str(model))
    if info.kind == "speed":
        raise RecipeError(f"model {info.name}: its weights are random, so it makes no pictures; choose another.")
    names = [name.strip() for name in str(recipes).split(",") if name.strip()]
    if not 1 <= len(names) <= MOST_RECIPES:
        raise RecipeError(
            f"recipes: got {len(names)}; name 1 to {MOST_RECIPES} with commas, such as rtn-w4a8,tr-dq-w4a8."
        )
    count = whole("groups", groups, 1, 1000)
    found = tuple(parse_recipe(name, groups=count) for name in dict.fromkeys(("fp", *names)))
    return run_spec(form, "compare", found, (check_prompt(str(prompt)),))


def told(event: Event) -> dict[str, Any] | None:
    """What a script hears of an event; nothing of those that name files of this machine."""
    if event.get("kind") not in ("stage", "progress", "warning"):
        return None
    return {"state": "running", "text": event.get("text", ""), **{name: event.get(name) for name in TOLD}}


def result(run: StoredRun, state: str, text: str) -> dict[str, Any]:
    """The numbers of every recipe and its first picture as a PNG in a data URL; no paths."""
    rows = {
        name: {key: value for key, value in facts.items() if key != "images"} for name, facts in run.recipes.items()
    }
    pictures = {name: _data_url(run, name) for name in run.recipes}
    return {
        "state": state, "text": text, "run": run.id, "recipes": rows, "noise_floor": run.noise_floor,
        "calibration": run.report.get("calibration"), "pictures": {name: url for name, url in pictures.items() if url},
    }  # fmt: skip


def _data_url(run: StoredRun, name: str) -> str:
    picture = run.picture(name, 0)
    if picture is None:
        return ""
    bytes_of = io.BytesIO()
    picture.save(bytes_of, "PNG")
    return "data:image/png;base64," + base64.b64encode(bytes_of.getvalue()).decode("ascii")
