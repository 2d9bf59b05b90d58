"""Command lines that do what the page does."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from trdq_core import local_models
from trdq_core.bitwidths import split_name
from trdq_core.presets import METHODS
from trdq_core.specs import Recipe, RunSpec


def compare(spec: RunSpec, files: Mapping[str, Path]) -> str:
    """The command of a comparison; recipes of `files` are named by their file, and those with sharing are left out."""
    plain = [recipe for recipe in spec.recipes if recipe.sharing is None]
    words = ["python -m trdq_core compare", model_flags(spec.model)]
    words.append("--recipes " + ",".join(recipe.name for recipe in plain if recipe.name not in files))
    words += [f"--recipe-file {shlex.quote(str(files[recipe.name]))}" for recipe in plain if recipe.name in files]
    named = [recipe for recipe in plain if recipe.name not in files and group_flags(recipe)]
    words += group_flags(named[-1]) if named else []
    words.append(f"--steps {spec.steps} --guidance {spec.guidance!r} --seed {spec.seed}")
    return " ".join([*words, *(f"--prompt {shlex.quote(text)}" for text in spec.prompts)])


def activations(model: str, recipe: Recipe, files: Mapping[str, Path], fingerprint: str, layer: str, group: int) -> str:
    """The command that looks at the same layer."""
    words = ["python -m trdq_core activations", model_flags(model)]
    file = files.get(recipe.name)
    words.append(f"--recipe-file {shlex.quote(str(file))}" if file else f"--recipe {recipe.name}")
    words += group_flags(recipe) if not file else []
    return " ".join([*words, f"--calibration {fingerprint} --layer {layer} --group {group}"])


def model_flags(model: str) -> str:
    """--model, and --model-root for a model that is found there."""
    return f"--model {shlex.quote(model)}{root_flag(model)}"


def root_flag(model: str) -> str:
    """--model-root for a model that is found there; empty for others."""
    under = model in {one.name for one in local_models.under_root()}
    return f" --model-root {shlex.quote(os.environ[local_models.ROOT_VARIABLE])}" if under else ""


def _takes_groups(recipe: Recipe) -> bool:
    method = METHODS.get(split_name(recipe.name)[0])
    several = recipe.time.count > 1 or recipe.time.kind != "uniform"
    return method is not None and method.time_grouped and several


def group_flags(recipe: Recipe) -> list[str]:
    """The flags that give a named recipe its time groups; none where the name says all."""
    time = recipe.time
    if not _takes_groups(recipe):
        return []
    if time.kind == "edges":
        flag = "--edges " + ",".join(repr(edge) for edge in time.edges)
    else:
        flag = "--group-kind per_step" if time.kind == "per_step" else f"--groups {time.count}"
        flag += " --group-kind dp" if time.kind == "dp" else ""
    return [flag, f"--storage {recipe.storage}"]
