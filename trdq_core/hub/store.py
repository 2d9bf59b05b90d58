"""Models of the hub on this machine: which are here whole, and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from trdq_core.cache import data_folder
from trdq_core.hub.known import KNOWN_MODELS

RECORD = "trdq-download.json"  # written last: a folder without it was not fetched to its end


class Downloaded(NamedTuple):
    """A model of the hub that is on this machine whole. `revision` is the commit that was fetched."""

    repo: str
    revision: str
    bytes: int
    created: str
    folder: Path

    @property
    def name(self) -> str:
        """The name it is picked by: that of the closed list, else the id without its slash."""
        return next((model.name for model in KNOWN_MODELS if model.repo == self.repo), self.folder.name)


def models_folder() -> Path:
    """Where downloaded models live."""
    return data_folder() / "models"


def folder_of(repo: str) -> Path:
    """The folder of a model, named owner--name."""
    return models_folder() / repo.replace("/", "--")


def downloaded() -> list[Downloaded]:
    """The models that were fetched whole, by name."""
    root = models_folder()
    found = (read_record(folder) for folder in sorted(root.iterdir()) if folder.is_dir()) if root.is_dir() else ()
    return [record for record in found if record is not None]


def read_record(folder: Path) -> Downloaded | None:
    """What a folder holds; None if its download did not come to its end."""
    try:
        about = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Downloaded(about["repo"], about["revision"], int(about["bytes"]), about["created"], folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def free_disk() -> int:
    """Free bytes where downloaded models go."""
    folder = models_folder()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
