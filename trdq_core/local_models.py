"""Diffusers folders on this machine that a person points at with --model-root: listed by name, looked at without loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from trdq_core.errors import ModelError

ROOT_VARIABLE = "TRDQ_MODEL_ROOT"


class LocalModel(NamedTuple):
    """A folder under the root; `reason` says why it cannot be used, empty where it can."""

    name: str
    folder: Path
    kind: str
    description: str
    reason: str


def use_root(folder: str | Path) -> None:
    """List the diffusers folders in `folder` from now on, here and in processes started from here; ModelError if it is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ModelError(f"--model-root: there is no folder {folder}; give one that holds diffusers folders.")
    os.environ[ROOT_VARIABLE] = str(root.resolve())


def under_root() -> list[LocalModel]:
    """The diffusers folders directly in the root, by name; none where no root is set.

    A name is only ever compared with what the root holds, never joined to a path, and what a link leads out of the root is
    left out.
    """
    root = os.environ.get(ROOT_VARIABLE)
    if not root or not Path(root).is_dir():
        return []
    base = Path(root).resolve()
    folders = (folder for folder in sorted(base.iterdir()) if (folder / "model_index.json").is_file())
    return [_described(folder) for folder in folders if folder.resolve().is_relative_to(base)]


def kind_of_folder(folder: Path) -> str:
    """ "video" if the transformer's class has three dimensions, as diffusers names those of clips alike; else "image"."""
    transformer = _index(folder).get("transformer")
    name = str(transformer[1]) if isinstance(transformer, list) and len(transformer) == 2 else ""
    return "video" if name.endswith("Transformer3DModel") else "image"


def _described(folder: Path) -> LocalModel:
    index = _index(folder)
    pipeline = str(index.get("_class_name", ""))
    if not index:
        reason = "its model_index.json is damaged; copy the folder again"
    elif not isinstance(index.get("transformer"), list):
        reason = f"its pipeline {pipeline or 'of no name'} has no transformer; UNets are not quantized"
    else:
        reason = ""
    return LocalModel(folder.name, folder, kind_of_folder(folder), f"{pipeline} in a folder of this machine.", reason)


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}
