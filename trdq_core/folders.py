"""Run folders: where they are, what is in them, and writing them so that nothing finished is lost."""

from __future__ import annotations

import datetime
import json
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trdq_core.cache import data_folder as data_folder
from trdq_core.errors import CalibrationError, StorageError
from trdq_core.events import Event, OnEvent, ignore
from trdq_core.specs import RunSpec, fused_name

STATES = ("done", "cancelled", "failed")


class RunInfo(NamedTuple):
    """One run folder. `state` is "done", "cancelled", "failed", or "unfinished" where its process ended without a word."""

    id: str
    command: str
    model: str
    created: str
    state: str
    folder: Path


class CalibrationInfo(NamedTuple):
    """One stored calibration."""

    fingerprint: str
    model: str
    prompts: int
    steps: int
    guidance: float
    seed: int
    created: str
    seconds: float
    folder: Path


def new_run_folder(command: str) -> Path:
    """A fresh folder name under the data folder; the run creates it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return data_folder() / "runs" / f"{stamp}-{command}-{secrets.token_hex(2)}"


class RunFolder:
    """Writes one run: spec, events as they happen, pictures, report. Every OSError becomes one plain sentence."""

    def __init__(self, folder: Path, spec: RunSpec, on_event: OnEvent = ignore) -> None:
        self.path = folder
        self._on_event = on_event
        self._started = time.monotonic()
        try:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / "previews").mkdir(exist_ok=True)
            (folder / "events.jsonl").write_text("")
        except OSError as error:
            raise _storage_error(folder, error) from error
        self.write("spec.json", spec.to_json())

    def emit(self, event: Event) -> None:
        """Append an event to the log and tell the listener."""
        event = {"time": round(time.monotonic() - self._started, 3), **event}
        try:
            with (self.path / "events.jsonl").open("a") as log:
                log.write(json.dumps(event) + "\n")
        except OSError as error:
            raise _storage_error(self.path, error) from error
        self._on_event(event)

    def write(self, name: str, text: str) -> None:
        """Write a text file, `name` being its path inside the folder, whole or not at all."""
        file = self._inside(name)
        partial = file.with_name(f"{file.name}.tmp")
        try:
            partial.parent.mkdir(exist_ok=True)
            partial.write_text(text)
            partial.replace(file)
        except OSError as error:
            raise _storage_error(self.path, error) from error

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write `report.json`."""
        self.write("report.json", json.dumps(report, indent=1, allow_nan=False))

    def save_picture(self, name: str, picture: np.ndarray) -> str:
        """Save (height, width, 3) uint8 under the run folder, whole or not at all: a page may read the one before meanwhile.
        Returns the path inside it."""
        file = self._inside(name)
        partial = file.with_name(f"{file.stem}.tmp{file.suffix}")
        try:
            Image.fromarray(picture).save(partial)
            partial.replace(file)
        except OSError as error:
            raise _storage_error(self.path, error) from error
        return name

    def _inside(self, name: str) -> Path:
        """The file called `name` in this folder; StorageError if the name leads out of it, whatever it was made of."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StorageError(f"run folder {self.path.name}: {name!r} is no file in it; use a name without slashes.")
        return self.path / name


def _storage_error(folder: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(
        f"run folder {folder.name}: could not be written ({reason}); free some disk space or choose another folder."
    )


def list_runs() -> list[RunInfo]:
    """All run folders under the data folder, newest first; folders without a readable spec are left out."""
    found = []
    root = data_folder() / "runs"
    for folder in sorted(root.iterdir(), reverse=True) if root.is_dir() else ():
        try:
            spec = json.loads((folder / "spec.json").read_text())
            lines = (folder / "events.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])["kind"] if lines else ""
            command, model = str(spec["command"]), fused_name(str(spec["model"]), spec.get("lora"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        stamp = re.match(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)", folder.name)
        created = "{}-{}-{}T{}:{}:{}".format(*stamp.groups()) if stamp else ""
        found.append(RunInfo(folder.name, command, model, created, last if last in STATES else "unfinished", folder))
    return found


def list_calibrations(model: str | None = None) -> list[CalibrationInfo]:
    """Stored calibrations, of one model if it is named, newest first."""
    found = []
    root = data_folder() / "calibrations"
    for folder in root.iterdir() if root.is_dir() else ():
        try:
            info = read_calibration(folder)
        except CalibrationError:
            continue
        if model is None or info.model == model:
            found.append(info)
    return sorted(found, key=lambda info: info.created, reverse=True)


def read_calibration(folder: Path) -> CalibrationInfo:
    """What a stored calibration is of; CalibrationError if its description is missing or damaged."""
    try:
        about = json.loads((folder / "statistics.json").read_text())
        return CalibrationInfo(
            about["fingerprint"], about["model"], len(about["prompts"]), about["steps"], about["guidance"],
            about["seed"], about["created"], about["seconds"], folder,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"calibration {folder.name}: damaged ({error}); delete it and calibrate again."
        ) from error
