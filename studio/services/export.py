"""Saving a recipe's model as a folder for diffusers, from the page: the run, what came of it in words, its archive."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.jobs import Work
from studio.services import commands
from studio.services.archives import pack
from studio.services.core import Core
from studio.services.stored import StoredRun, StoredRuns, command_line, inside
from studio.services.work import run_work
from trdq_core.errors import RecipeError, StorageError
from trdq_core.specs import Recipe, RunSpec

FOLDER = "model"  # of a save run's folder, where the page always saves
MOST_LOOKED_AT = 20  # save runs, newest first, when one with the same settings is sought


def export_names(run: StoredRun | None) -> list[str]:
    """The columns of a finished comparison whose model can be saved; none of a run that made no pictures."""
    if run is None or run.spec is None or run.state != "done" or not run.has_pictures:
        return []
    found = (recipe for recipe in run.spec.recipes if _changes(recipe))
    return [recipe.name for recipe in found if run.recipes.get(recipe.name, {}).get("kind") in ("quantized", "shared")]


def export_spec(spec: RunSpec, recipe_name: str) -> RunSpec:
    """The save run of one recipe of a comparison, with its calibration and its first prompt. RecipeError for the reference.

    The folder is always inside the run folder: a page names no place on the machine.
    """
    recipe = next((one for one in spec.recipes if one.name == recipe_name), None)
    if recipe is None or not _changes(recipe):
        raise RecipeError(f"save: {recipe_name!r} is no quantized column of this comparison; choose another column.")
    return replace(spec, command="save", recipes=(recipe,), prompts=spec.prompts[:1], save_to=None, push_to_hub=None)


def export_work(core: Core, spec: RunSpec, recipe_name: str) -> Work:
    """Work that saves a recipe's model; its result is the run folder, whose report has `saved`."""
    return run_work(core, export_spec(spec, recipe_name))


def save_work(core: Core, run: StoredRun | None, recipe_name: str) -> tuple[str, Work]:
    """The model of a run, and the work that saves one of its columns; RecipeError if there is no such run or column."""
    if run is None or run.spec is None:
        raise RecipeError("save: there is no run to save from; compare first, or open a run under Runs.")
    return run.spec.model, export_work(core, run.spec, recipe_name)


def export_command(spec: RunSpec, recipe_name: str, recipe_file: Path | None = None) -> str:
    """The command line that does the same; a recipe that has no name of its own is given by its file.

    Empty for a recipe with attention sharing: its plan has no name, so only its finished run can be repeated.
    """
    recipe = export_spec(spec, recipe_name).recipes[0]
    if recipe.sharing is not None:
        return ""
    which = f"--recipe {recipe.name}" if recipe_file is None else f"--recipe-file {shlex.quote(str(recipe_file))}"
    words = [f"python -m trdq_core save {commands.model_flags(spec.model)} {which}"]
    if recipe_file is None:
        words += commands.group_flags(recipe)
    words.append(f"--steps {spec.steps} --guidance {spec.guidance!r} --seed {spec.seed}")
    if spec.lora is not None:
        words.append(f"--lora {shlex.quote(spec.lora)} --lora-scale {spec.lora_scale!r}")
    words.append(f"--calibration-prompts {len(spec.calibration_prompts)} --out FOLDER")
    return " ".join(words)


def command_of(run: StoredRun | None, recipe_name: str, files: Mapping[str, Path]) -> str:
    """The command line for a column of a comparison, or of a save run itself; `files` are those of saved recipes."""
    if run is None or run.spec is None or not recipe_name:
        return ""
    if run.spec.command == "save":
        return command_line(run)
    return export_command(run.spec, recipe_name, files.get(recipe_name))


def export_words(report: Mapping[str, Any], *, local: bool = True) -> str:
    """What a finished save run says: where the folder is, its size, and whether it came back to the bit.

    `local` is whether the reader sits at this machine; a visitor from elsewhere has no use for a place on it.
    """
    saved = report["saved"]
    ratio = saved["denoiser_bytes"] / saved["fp_denoiser_bytes"]
    verdict = {
        True: "Loaded again by diffusers, it samples the same bits.",
        False: "Loaded again by diffusers, it does NOT sample the same bits; please report this.",
        None: "It was not loaded again.",
    }[saved["bit_equal"]]
    place = f"Saved in {saved['folder']}" if local else "Saved"
    return (
        f"{place}: {saved['bytes'] / 2**20:.1f} MiB, the denoiser {saved['denoiser_bytes'] / 2**20:.1f} "
        f"MiB, {ratio:.0%} of full precision. {verdict}"
    )


def saved_folder(run: StoredRun | None) -> Path | None:
    """The folder that a save run left inside its own; nothing for any other run, or one that saved elsewhere."""
    if run is None or not isinstance(run.report.get("saved"), dict):
        return None
    folder = inside(run.folder, FOLDER)
    return folder if folder is not None and folder.is_dir() else None


def saved_before(runs: StoredRuns, run: StoredRun, recipe_name: str) -> StoredRun | None:
    """The newest save run of this column with the same settings that finished; a save run is its own."""
    if run.spec is None or run.spec.command == "save":
        return run if run.spec is not None and run.report.get("saved") else None
    asked = export_spec(run.spec, recipe_name)
    ids = [info.id for info in runs.core.runs.list_runs() if info.command == "save" and info.state == "done"]
    found = (runs.open(one) for one in ids[:MOST_LOOKED_AT])
    return next((one for one in found if one is not None and one.spec == asked and saved_folder(one)), None)


def export_archive(run: StoredRun | None, *, local: bool) -> Path:
    """A zip of a saved model; StorageError if there is none or it is too large, with its place only if `local`."""
    folder = saved_folder(run)
    if run is None or folder is None:
        raise StorageError("download: there is no saved model here any more; save it again.")
    recipe = run.spec.recipes[0].name if run.spec and run.spec.recipes else FOLDER
    place = f"it lies in {folder}" if local else "save it on a machine of your own with the command line"
    return pack(f"{run.id}-{FOLDER}", f"{Path(run.spec.model).name}-{recipe}" if run.spec else FOLDER, [folder], place)


def _changes(recipe: Recipe) -> bool:
    """Whether a recipe makes a model of this project's: another tool saves its own."""
    return recipe.peer is None and (recipe.quantized or recipe.sharing is not None)
