"""Sensitivity scans: running one, the stored ones, and bits for each layer within a number of bytes."""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from studio.services import prompts
from studio.services.core import Core
from studio.services.form import Form, grouping, run_spec, whole
from studio.services.methods import title_of_method
from trdq_core.arguments import SENSITIVITY_BITS
from trdq_core.errors import CalibrationError, RecipeError, TRDQError
from trdq_core.presets import METHODS, OFFERED_BITS, parse_recipe
from trdq_core.sensitivity.table import FILE, Sensitivity
from trdq_core.sensitivity.table import Cell as Cell
from trdq_core.specs import RunSpec

log = logging.getLogger(__name__)
Error = Literal["denoiser_error", "layer_error"]
Order = Literal["model", "largest", "role"]

DEFAULT_METHOD = "rtn"
DEFAULT_PROMPTS, MOST_PROMPTS = 2, 16
DEFAULT_BITS = list(SENSITIVITY_BITS)
BITS_CHOICES = list(dict.fromkeys((*OFFERED_BITS, *SENSITIVITY_BITS)))
ERROR_CHOICES: list[tuple[str, Error]] = [("Of the prediction", "denoiser_error"), ("Of the layer", "layer_error")]
ERROR_WORDS: dict[Error, str] = {
    "denoiser_error": "error of the denoiser's prediction",
    "layer_error": "error of the layer's own output",
}
ORDER_CHOICES: list[tuple[str, Order]] = [("Model", "model"), ("Largest first", "largest"), ("Role", "role")]
MOST_OPEN = 8  # scans kept in memory


class Bar(NamedTuple):
    """One layer of the chart."""

    layer: str
    role: str
    error: float


class ScanView(NamedTuple):
    """A stored scan."""

    id: str  # of the run
    model: str
    method: str
    table: Sensitivity
    folder: Path

    @property
    def title(self) -> str:
        """One line that tells scans apart; says if it was stopped before its last bit-width."""
        about = self.table.about
        count = len(about.get("prompts") or ())
        said = f"{title_of_method(self.method)} · {', '.join(self.table.bits)} · {count} prompt{'s' * (count != 1)}"
        partial = "" if about.get("complete", True) else " · stopped early"
        return f"{when(self.id)} · {said} · {about.get('steps', '?')} steps{self._groups()}{partial}"

    def _groups(self) -> str:
        """The time groups that the layers were fitted in, where there are several."""
        time, steps = next(iter(self.table.recipes.values())).time, self.table.about.get("steps")
        count = time.groups_in(steps) if isinstance(steps, int) else time.count
        return f" · {count} time groups" if count > 1 else ""

    def bars(self, bits: Any, error: Any, order: Any) -> list[Bar]:
        """The layers' errors at one bit-width, in the order asked for; RecipeError for a choice there is not."""
        label, which = self.check_bits(bits), check_error(error)
        found = [Bar(x.layer, x.role, float(getattr(x.cells[label], which))) for x in self.table.layers]
        if order == "largest":
            return sorted(found, key=lambda bar: -bar.error)
        roles = list(dict.fromkeys(bar.role for bar in found))
        return sorted(found, key=lambda bar: roles.index(bar.role)) if order == "role" else found

    def check_bits(self, bits: Any) -> str:
        """`bits` if the scan has them; RecipeError otherwise."""
        if bits not in self.table.bits:
            raise RecipeError(f"bits: got {str(bits)[:20]!r}; this scan has {', '.join(self.table.bits)}.")
        return str(bits)

    def errors(self) -> Mapping[str, Mapping[str, float]]:
        """The denoiser's error by layer and bit label."""
        return {x.layer: {bits: cell.denoiser_error for bits, cell in x.cells.items()} for x in self.table.layers}


@dataclass(frozen=True)
class Scans:
    """The scans in the data folder, found by run ids that the core listed."""

    core: Core
    _open: dict[tuple[str, int], ScanView] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def choices(self, model: str) -> list[tuple[str, str]]:
        """The scans of a model for a dropdown, newest first; damaged ones are left out."""
        found = []
        for info in self.core.runs.list_runs():
            if info.command == "sensitivity" and info.model == model:
                try:
                    view = self._read(info)
                except TRDQError as error:
                    log.warning("The scan %s is left out: %s", info.id, error)
                    continue
                if view is not None:
                    found.append((view.title, view.id))
        return found

    def open(self, run_id: Any) -> ScanView:
        """The scan of this run; CalibrationError if the core lists none, or it is damaged."""
        info = next((info for info in self.core.runs.list_runs() if info.id == run_id), None)
        view = self._read(info) if info is not None else None
        if view is None:
            raise CalibrationError("scan: it is not there any more; choose another, or press Scan.")
        return view

    def allocate(self, view: ScanView, budget: Any) -> Any:
        """The core's allocation within `budget`, bytes or a share as `--bytes` takes them; RecipeError for others."""
        text = str(budget or "").strip()
        if not text:
            raise RecipeError("budget: it is empty; write bytes, 3.2MB, or a share of FP32 such as 0.2.")
        try:
            return self.core.budget.allocate(view.table, self.core.budget.parse_bytes(text, view.table))
        except RecipeError as error:
            raise RecipeError(str(error).replace("--bytes:", "budget:")) from error

    def _read(self, info: Any) -> ScanView | None:
        file = Path(info.folder) / FILE
        if not file.is_file():
            return None
        key = (str(info.id), file.stat().st_mtime_ns)
        with self._lock:
            if key not in self._open:
                while len(self._open) >= MOST_OPEN:
                    self._open.pop(next(iter(self._open)))
                table = Sensitivity.load(file)
                if not table.bits or not table.layers:
                    return None
                method = str(table.about.get("method", ""))
                self._open[key] = ScanView(info.id, info.model, method, table, Path(info.folder))
            return self._open[key]


def scan_spec(form: Form, method: Any, bits: Any, count: Any) -> RunSpec:
    """The scan of a method at several bit-widths, in the form's time groups, as the command line would make it."""
    if method not in METHODS or method == "fp":
        raise RecipeError(f"scan method: got {str(method)[:40]!r}; choose a method that quantizes, such as rtn.")
    labels = tuple(label for label in BITS_CHOICES if label in (bits or ()))
    if not labels:
        raise RecipeError("scan bits: none is chosen; choose at least one bit-width, such as W4A8.")
    texts = prompts.calibration(str(form.model))[: whole("scan prompts", count, 1, MOST_PROMPTS)]
    groups = grouping(form)
    recipes = tuple(parse_recipe(f"{method}-{label.lower()}", **groups) for label in labels)
    spec = run_spec(form, "sensitivity", recipes, texts)
    return RunSpec.from_dict(spec.to_dict() | {"bits": list(labels)})


def scan_command(view: ScanView) -> str:
    """The command that repeats the scan exactly, from the settings stored in its folder."""
    return f"python -m trdq_core sensitivity --spec {shlex.quote(str(view.folder / 'spec.json'))} --out runs/scan"


def budget_command(view: ScanView, budget: Any) -> str:
    """The command that chooses the same bits."""
    given = shlex.quote(str(budget).strip())
    return f"python -m trdq_core budget --sensitivity {shlex.quote(str(view.folder))} --bytes {given} --out plan.json"


def check_error(error: Any) -> Error:
    """`error` if it is one of the two that a scan has; RecipeError otherwise."""
    if error not in ERROR_WORDS:
        raise RecipeError(f"error: got {str(error)[:40]!r}; allowed are {', '.join(ERROR_WORDS)}.")
    return error


def when(run_id: str) -> str:
    """ "2026-11-21 08:15" of a run's id, which begins with its time."""
    stamp = run_id[:15]
    if len(stamp) == 15 and stamp.replace("-", "").isdigit():
        return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]}"
    return run_id
