"""Runs about attention sharing: measuring it, trying a plan, and the same from the command line."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from studio.services import commands, prompts
from studio.services.form import AppliedPlan, Form, chosen_recipe, compare_spec, run_spec, shared, whole
from studio.services.stored import StoredRun
from trdq_core.errors import RecipeError, StorageError, TRDQError
from trdq_core.presets import make_recipe
from trdq_core.specs import RunSpec, SharingSpec, check_prompt

DEFAULT_PROMPTS, MOST_PROMPTS = 4, 32
SUFFIX = "+sharing"
MOST_KEPT = 1_000_000  # characters of a plan that a browser may hand back
BASE_CHOICES = [("Full precision", "fp"), ("Chosen method", "chosen")]


def attention_spec(form: Form, count: Any) -> RunSpec:
    """The measurement over the first `count` evaluation prompts, as the command line would make it."""
    texts = prompts.evaluation(str(form.model), whole("prompts to measure on", count, 1, MOST_PROMPTS), "")
    return run_spec(form, "attention", (), texts)


def trial_spec(form: Form, base: Any, plan: SharingSpec, model: str) -> RunSpec:
    """One prompt with and without the plan: full precision, or the chosen method beside full precision."""
    if base not in ("fp", "chosen"):
        raise RecipeError(f"base: got {str(base)[:40]!r}; allowed are fp and chosen.")
    if not plan.active:
        raise RecipeError("sharing: the plan shares no block; move the threshold, or take the published list.")
    reference = make_recipe("fp")
    recipe = reference if base == "fp" else chosen_recipe(form)
    both = shared(form, (recipe,), AppliedPlan(model, plan))
    recipes = both if base == "fp" else (reference, *both)
    return run_spec(form, "compare", recipes, (check_prompt(str(form.prompt or "")),))


def pair_of(run: StoredRun | None) -> tuple[str, str] | None:
    """The recipe without sharing and the same with it, the last such pair of a run; nothing if it has none."""
    names = [recipe.name for recipe in run.spec.recipes] if run and run.spec else []
    name = next((name for name in reversed(names) if name.endswith(SUFFIX)), None)
    return (name.removesuffix(SUFFIX), name) if name else None


def plan_words(plan: SharingSpec) -> str:
    """A plan in a few words: what it came from, and what it is foretold to save."""
    blocks = len({block for group in plan.blocks for block in group})
    said = "1 block" if blocks == 1 else f"{blocks} blocks"
    if plan.measure is not None:
        relation = "≤" if plan.measure == "output_error" else "≥"
        said += f", {plan.measure.replace('_', ' ')} {relation} {plan.threshold:g}"
    elif plan.description:
        said += f", {plan.description}"
    if plan.predicted_saving is not None:
        said += f", saves {plan.predicted_saving:.1%} of attention FLOPs"
    return said


@cache
def _files() -> tempfile.TemporaryDirectory[str]:
    """Where plans wait to be fetched; removed when the studio ends."""
    return tempfile.TemporaryDirectory(prefix="trdq-plans-", ignore_cleanup_errors=True)


def plan_file(plan: SharingSpec) -> Path:
    """A plan.json that `--sharing` takes; StorageError if it cannot be written."""
    text = plan.to_json()
    folder = Path(_files().name) / hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        folder.mkdir(exist_ok=True)
        (folder / "plan.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"plan.json: it could not be written ({error.strerror}).") from error
    return folder / "plan.json"


def measure_command(run: StoredRun | None, plan: SharingSpec) -> str:
    """The command that measures again and writes the same plan.json; empty for a plan without a threshold."""
    if run is None or plan.measure is None or plan.threshold is None:
        return ""
    words = ["python -m trdq_core attention --spec", shlex.quote(str(run.folder / "spec.json"))]
    words += [f"--threshold {plan.threshold!r} --measure {plan.measure}"]
    if plan.edges:
        words.append("--edges " + ",".join(repr(edge) for edge in plan.edges))
    return " ".join([*words, "--out runs/attention"])


def compare_command(form: Form, files: Mapping[str, Path] | None = None) -> str:
    """The command that compares as the Compare page would with the applied plan, given plan.json; TRDQError as there.

    `files` are those of saved recipes by name.
    """
    return commands.compare(compare_spec(form), files or {}) + " --sharing plan.json"


def kept(applied: Any) -> str | None:
    """An applied plan as the text that the browser keeps over a reload; None where none is applied."""
    if not isinstance(applied, AppliedPlan):
        return None
    return json.dumps({"model": applied.model, "plan": applied.plan.to_dict()})


def restored(text: Any) -> AppliedPlan | None:
    """The plan that the browser kept; None for nothing and for whatever is no plan: the text has been out of our hands."""
    if not isinstance(text, str) or len(text) > MOST_KEPT:
        return None
    try:
        about = json.loads(text)
        return AppliedPlan(str(about["model"])[:200], SharingSpec.from_dict(about["plan"]))
    except (ValueError, KeyError, TypeError, AttributeError, TRDQError):
        return None
