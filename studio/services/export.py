"""Saving a recipe's model as a folder for diffusers, from the page: the run, and what came of it in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.jobs import Work
from studio.services.core import Core
from studio.services.work import run_work
from trdq_core.errors import RecipeError
from trdq_core.specs import Recipe, RunSpec


def export_spec(spec: RunSpec, recipe_name: str) -> RunSpec:
    """The save run of one recipe of a comparison, with its calibration and its first prompt. RecipeError for the reference.

    The folder is always inside the run folder: a page names no place on the machine.
    """
    recipe = next((one for one in spec.recipes if one.name == recipe_name), None)
    if recipe is None or not (recipe.quantized or recipe.sharing is not None):
        raise RecipeError(f"save: {recipe_name!r} is no quantized column of this comparison; choose another column.")
    return replace(spec, command="save", recipes=(recipe,), prompts=spec.prompts[:1], save_to=None, push_to_hub=None)


def export_work(core: Core, spec: RunSpec, recipe_name: str) -> Work:
    """Work that saves a recipe's model; its result is the run folder, whose report has `saved`."""
    return run_work(core, export_spec(spec, recipe_name))


def export_command(spec: RunSpec, recipe_name: str, recipe_file: Path | None = None) -> str:
    """The command line that does the same; a recipe that has no name of its own is given by its file."""
    recipe: Recipe = export_spec(spec, recipe_name).recipes[0]
    which = f"--recipe {recipe.name}" if recipe_file is None else f"--recipe-file {shlex.quote(str(recipe_file))}"
    words = [f"python -m trdq_core save --model {shlex.quote(spec.model)} {which}"]
    if recipe_file is None and recipe.storage != "shared":
        words.append(f"--groups {recipe.time.count} --storage {recipe.storage}")
    words.append(f"--steps {spec.steps} --guidance {spec.guidance!r} --seed {spec.seed}")
    words.append(f"--calibration-prompts {len(spec.calibration_prompts)} --out FOLDER")
    return " ".join(words)


def export_words(report: Mapping[str, Any]) -> str:
    """What a finished save run says: where the folder is, its size, and whether it came back to the bit."""
    saved = report["saved"]
    ratio = saved["denoiser_bytes"] / saved["fp_denoiser_bytes"]
    verdict = {
        True: "Loaded again by diffusers, it samples the same bits.",
        False: "Loaded again by diffusers, it does NOT sample the same bits; please report this.",
        None: "It was not loaded again.",
    }[saved["bit_equal"]]
    return (
        f"Saved in {saved['folder']}: {saved['bytes'] / 2**20:.1f} MiB, the denoiser {saved['denoiser_bytes'] / 2**20:.1f} "
        f"MiB, {ratio:.0%} of full precision. {verdict}"
    )
