"""Stored runs: their reports, pictures and settings, found by ids that the core listed and never by a path from the page."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from studio.services import commands, pictures
from studio.services.archives import pack
from studio.services.core import Core
from trdq_core.errors import TRDQError
from trdq_core.specs import RunSpec

MOST_LISTED = 200


class RunRow(NamedTuple):
    """One line of the table of runs."""

    created: str
    command: str
    model: str
    recipes: str
    state: str
    id: str


@dataclass(frozen=True)
class StoredRun:
    """One run's folder as far as it is there. `report` is empty if the run did not get that far."""

    id: str
    folder: Path
    state: str
    report: dict[str, Any]
    spec: RunSpec | None

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """The report's recipes by name; the noise floor is left out, and a row that only shares has the reference's label."""
        found = self.report.get("recipes") or {}
        label = (self.report.get("reference") or {}).get("label")
        return {
            name: {**facts, "label": label} if facts.get("kind") == "shared" else facts
            for name, facts in found.items()
            if facts.get("kind") != "noise_floor"
        }

    @property
    def has_pictures(self) -> bool:
        """Whether any recipe of the run left a picture."""
        return any(facts.get("images") for facts in self.recipes.values())

    @property
    def noise_floor(self) -> dict[str, Any] | None:
        """FP against FP again, if it was measured."""
        found = (self.report.get("recipes") or {}).values()
        return next((facts for facts in found if facts.get("kind") == "noise_floor"), None)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the run in order."""
        return list(self.report.get("prompts") or (self.spec.prompts if self.spec else ()))

    def events(self) -> list[dict[str, Any]]:
        """What the run told while it went on, in order; lines that cannot be read are left out."""
        try:
            lines = (self.folder / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = (_object(line) for line in lines)
        return [event for event in found if event]

    @property
    def traces(self) -> dict[str, Path]:
        """The Chrome traces of a profile by recipe, those that are there."""
        named = {name: facts.get("trace_file") for name, facts in self.recipes.items()}
        found = {name: inside(self.folder, str(file)) for name, file in named.items() if file}
        return {name: path for name, path in found.items() if path is not None and path.is_file()}

    def picture(self, recipe: str, prompt: int) -> Image.Image | None:
        """One recipe's picture of one prompt; nothing if it was not finished."""
        images = self.recipes.get(recipe, {}).get("images") or []
        if not 0 <= prompt < len(images):
            return None
        path = inside(self.folder, str(images[prompt]))
        return pictures.load(path) if path else None


@dataclass(frozen=True)
class StoredRuns:
    """The runs in the data folder."""

    core: Core

    def rows(self) -> list[RunRow]:
        """The newest runs, newest first."""
        return [self._row(info) for info in self.core.runs.list_runs()[:MOST_LISTED]]

    def open(self, run_id: str | None) -> StoredRun | None:
        """The run with this id if the core lists one."""
        info = next((info for info in self.core.runs.list_runs() if info.id == run_id), None)
        if info is None:
            return None
        folder = Path(info.folder)
        return StoredRun(info.id, folder, info.state, _json(folder / "report.json"), _spec(folder))

    def newest(self, command: str = "compare") -> StoredRun | None:
        """The newest finished run of a command."""
        infos = self.core.runs.list_runs()
        info = next((info for info in infos if info.command == command and info.state == "done"), None)
        return self.open(info.id) if info else None

    def _row(self, info: Any) -> RunRow:
        spec = _spec(Path(info.folder))
        recipes = ", ".join(recipe.name for recipe in spec.recipes) if spec else ""
        created = str(info.created).replace("T", " ")[:19]
        return RunRow(created, info.command, info.model, recipes, info.state, info.id)


def inside(folder: Path, relative: str) -> Path | None:
    """The path of a file that lies in `folder`; nothing if the name leads out of it."""
    path = (folder / relative).resolve()
    return path if path.is_relative_to(folder.resolve()) else None


def archive(run: StoredRun) -> Path:
    """A zip of the run's folder without a model that it saved; StorageError if it is too large or cannot be written."""
    models = [run.folder / "model"] if run.report.get("saved") else []
    return pack(run.id, run.id, [run.folder], "look into the run's folder on the machine of the studio", models)


def command_line(run: StoredRun) -> str:
    """The command that repeats the run exactly, from the settings stored in its folder."""
    command = run.spec.command if run.spec else "compare"
    root = commands.root_flag(run.spec.model) if run.spec else ""
    return f"python -m trdq_core {command} --spec {shlex.quote(str(run.folder / 'spec.json'))}{root}"


def psnr_text(facts: dict[str, Any]) -> str:
    """PSNR as text; identical pictures have none."""
    if facts.get("identical"):
        return "identical"
    value = facts.get("psnr")
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.1f} dB"


def _json(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is; empty if it is none."""
    try:
        data = json.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _spec(folder: Path) -> RunSpec | None:
    try:
        return RunSpec.from_json((folder / "spec.json").read_text(encoding="utf-8"))
    except (OSError, TRDQError, ValueError):
        return None
