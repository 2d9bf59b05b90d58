"""Looking at a folder before a model is built from its config.json: what is refused then costs no time and no memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trdq_core.checkpoints.describe import plain_config
from trdq_core.checkpoints.files import Checkpoint, open_checkpoint
from trdq_core.checkpoints.manifest import KEY
from trdq_core.errors import CheckpointError

STEM = "diffusion_pytorch_model"  # what diffusers calls the weights of a model
METHOD = "trdq"


def check_before_loading(folder: Path, model_class: str, variant: str | None = None) -> None:
    """CheckpointError unless config.json and the headers in `folder` agree on what the weights are.

    `model_class` is the class that is about to be built, `variant` the one of the files that was asked for. Folders without
    a quantized model pass, whatever else is wrong with them: that is for the library that reads them.
    """
    files = weight_files(folder, variant)
    config = _config(folder)
    told = config.get("quantization_config") if config is not None else None
    ours = isinstance(told, Mapping) and told.get("quant_method") == METHOD
    marked = next((file for file in files if _is_marked(file)), None)
    if not ours and marked is None:
        return
    where = folder.name
    if config is None:
        raise CheckpointError(f"{where}: config.json cannot be read; copy the folder again.")
    if not ours:
        raise CheckpointError(
            f"{where}: its files hold a model quantized by TR-DQ Studio, and quantization_config in config.json does not say "
            "so; copy the folder again."
        )
    if not files:
        raise CheckpointError(f"{where}: it has no safetensors file, and only those are read; copy the folder again.")
    _check_config(open_checkpoint(files), config, model_class)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that diffusers would load: the shards where there is an index, else the one file."""
    stem = STEM if variant is None else f"{STEM}.{variant}"
    shard = re.compile(rf"{re.escape(STEM)}(-\d+-of-\d+)({re.escape(stem.removeprefix(STEM))})\.safetensors")
    other = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.safetensors")
    indices = [
        folder / f"{STEM}.safetensors.index{stem.removeprefix(STEM)}.json",
        folder / f"{stem}.safetensors.index.json",
    ]
    if any(index.is_file() for index in indices):
        names = sorted(folder.glob("*.safetensors"))
        return [file for file in names if shard.fullmatch(file.name) or other.fullmatch(file.name)]
    file = folder / f"{stem}.safetensors"
    return [file] if file.is_file() else []


def quantization_of(folder: Path) -> str | None:
    """The quantization method that config.json in `folder` names, None for a full-precision model or no readable file."""
    told = (_config(folder) or {}).get("quantization_config")
    if not isinstance(told, Mapping):
        return None
    recipe = told.get("recipe")
    named = recipe.get("name") if isinstance(recipe, Mapping) else None
    return str(named or told.get("quant_method"))[:60]


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _is_marked(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as stored:
            return KEY in (stored.metadata() or {})
    except (OSError, SafetensorError):
        return False  # not ours to say


def _check_config(checkpoint: Checkpoint, config: Mapping[str, Any], model_class: str) -> None:
    manifest, where = checkpoint.manifest, checkpoint.folder
    named = config.get("_class_name", model_class)
    if not named == model_class == manifest.model_class:
        other = named if named != manifest.model_class else model_class
        raise CheckpointError(
            f"{where}: it holds a {manifest.model_class:.60} and not a {other!r:.60}; use the class it is of, and copy the "
            "folder again if config.json was changed."
        )
    here, saved = plain_config(config), dict(manifest.config)
    changed = sorted(key for key in {*here, *saved} if key not in here or key not in saved or here[key] != saved[key])
    if changed:
        raise CheckpointError(
            f"{where}: config.json was changed since it was saved ({', '.join(changed)[:100]}); copy the folder again."
        )
