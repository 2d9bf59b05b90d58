"""The compare command: one reference, then one row for each recipe, each written as soon as it is there."""

from __future__ import annotations

import time
from typing import Any

from trdq_core.convert import Conversion
from trdq_core.errors import PeerError, RecipeError
from trdq_core.execution.rows import NOISE_FLOOR, REFERENCE, changed_row, fp_bytes, quality
from trdq_core.execution.samples import sample_all
from trdq_core.execution.timing import time_steps
from trdq_core.peers.convert import PeerConversion
from trdq_core.session import Session, convert_for, failed_row, statistics_for
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics


def compare(session: Session, report: dict[str, Any]) -> None:
    """Pictures or clips of every prompt with the reference, the reference again, and each recipe; then all timed in turn."""
    spec, rows = session.spec, report["recipes"]
    if not spec.prompts:
        raise RecipeError("prompts: there are none; give at least one prompt to compare pictures of.")
    changed = [recipe for recipe in spec.recipes if recipe.changes]
    quantized = [recipe for recipe in changed if recipe.quantized]
    session.conditionings = session.model.encode(spec.prompts)
    _references(session, report, fp_bytes(session, quantized))
    statistics = statistics_for(session, report) if any(recipe.fitted for recipe in changed) else None
    conversions: dict[str, Conversion | PeerConversion] = {}
    for recipe in changed:
        try:
            conversions[recipe.name], row = _column(session, report, recipe, statistics)
        except PeerError as error:
            row = failed_row(session, error)
        rows[recipe.name] = row
        session.folder.emit({"kind": "result", "recipe": recipe.name, "metrics": dict(row)})
        session.folder.write_report(report)
    time_steps(session, report, conversions)


def _column(
    session: Session, report: dict[str, Any], recipe: Recipe, statistics: Statistics | None
) -> tuple[Conversion | PeerConversion, dict[str, Any]]:
    """One recipe, or another tool in its place: converted, sampled and compared with the reference."""
    started = time.monotonic()
    conversion = convert_for(session, recipe, statistics)
    seconds = {"fit_seconds": round(time.monotonic() - started, 2)}
    if recipe.fitted:
        seconds["calibration_seconds"] = report["calibration"]["seconds"]
    session.stage("sample", f"Sampling {recipe.name}", recipe.name)
    samples = sample_all(session, recipe.name, conversion.denoiser)
    return conversion, {**seconds, **changed_row(session, conversion, samples), **quality(session, samples)}


def _references(session: Session, report: dict[str, Any], weights: dict[str, Any]) -> None:
    """The row of the reference, kept to compare with, and that of the reference against itself."""
    rows, label = report["recipes"], report["reference"]["label"]
    session.stage("reference", f"Sampling {label}", REFERENCE)
    samples = sample_all(session, REFERENCE, session.model.denoiser, keep=True)
    session.references, session.pictures = samples.runs, samples.pictures
    rows[REFERENCE] = {"kind": "reference", "label": label, **weights, **samples.row()}
    session.folder.emit({"kind": "result", "recipe": REFERENCE, "metrics": dict(rows[REFERENCE])})
    session.folder.write_report(report)
    session.stage("reference", "Sampling the reference again for the noise floor", NOISE_FLOOR)
    samples = sample_all(session, NOISE_FLOOR, session.model.denoiser, previews=False)
    rows[NOISE_FLOOR] = {
        "kind": "noise_floor",
        "label": "again",
        **weights,
        **samples.row(),
        **quality(session, samples),
    }
    session.folder.write_report(report)
