"""The sensitivity command: one bit-width after the other, saved as it goes, gone on with after a stop."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from typing import Any

from trdq_core.bitwidths import split_name
from trdq_core.errors import RecipeError, TRDQError
from trdq_core.evaluation.references import batch_size
from trdq_core.sensitivity.measure import Recorded, Target, measure_layers, record, targets_of
from trdq_core.sensitivity.table import FILE, Cell, LayerSensitivity, Sensitivity
from trdq_core.session import Session, convert_for, statistics_for
from trdq_core.specs import RunSpec
from trdq_core.statistics import Statistics


def sensitivity(session: Session, report: dict[str, Any]) -> None:
    """Measure and leave sensitivity.json, sensitivity.csv and sensitivity_roles.csv in the run folder; the report has the
    totals of roles and of everything."""
    _check(session.spec)
    found = measure_sensitivity(session, statistics_for(session, report))
    totals = {
        label: {
            "denoiser_error": sum(layer.cells[label].denoiser_error for layer in found.layers),
            "bytes": sum(layer.cells[label].bytes for layer in found.layers),
            "packed_bytes": sum(layer.cells[label].packed_bytes for layer in found.layers),
        }
        for label in found.bits
    }
    whole = found.to_dict()
    roles = {
        role.role: {"layers": role.layers, "cells": {bits: cell._asdict() for bits, cell in role.cells.items()}}
        for role in found.roles().values()
    }
    report["sensitivity"] = {"bits": whole["bits"], "layers": whole["layers"], "roles": roles, "totals": totals}


def _check(spec: RunSpec) -> None:
    if not spec.prompts or not spec.bits:
        raise RecipeError("sensitivity: it takes at least one prompt and one bit-width; give --prompts and --bits.")
    if len(spec.recipes) != len(spec.bits) or not all(recipe.fitted for recipe in spec.recipes):
        raise RecipeError(
            f"sensitivity: got {len(spec.recipes)} recipes for {len(spec.bits)} bit-widths; give one quantizing recipe each."
        )


def measure_sensitivity(session: Session, statistics: Statistics) -> Sensitivity:
    """The table of the run's recipes, one for each of its bit-widths, measured on its prompts.

    After each bit-width the table so far is written; the same run in the same folder goes on from it.
    """
    spec, model = session.spec, session.model
    _check(spec)
    started = time.monotonic()
    targets = targets_of(model.linears(), spec.recipes[0])
    columns = _finished(session)
    before = columns.pop("seconds", 0.0)
    session.stage("reference", f"Recording the denoiser on {len(spec.prompts)} prompts")
    progress = session.progress("reference", -(-len(spec.prompts) // batch_size(model)) * spec.steps)
    recorded = record(
        model, spec.prompts, steps=spec.steps, guidance=spec.guidance, seed=spec.seed, on_step=progress.advance
    )
    found = _table(session, targets, columns, recorded, before)
    for label, recipe in zip(spec.bits, spec.recipes, strict=True):
        if label in columns:
            continue
        conversion = convert_for(session, recipe, statistics)
        session.stage("measure", f"Quantizing {len(targets)} layers alone to {label}", recipe.name)
        progress = session.progress("measure", len(targets), recipe.name)
        columns[label] = measure_layers(
            model, conversion, targets, statistics, recorded, guided=spec.guidance > 1, advance=progress.advance
        )
        found = _table(session, targets, columns, recorded, before + time.monotonic() - started)
        session.folder.write(FILE, found.to_json())
        session.folder.write("sensitivity.csv", found.csv_text())
        session.folder.write("sensitivity_roles.csv", found.roles_csv_text())
    return found


def _finished(session: Session) -> dict[str, Any]:
    """Columns that an earlier start of this very run left, by bit label; and the seconds it took."""
    with suppress(TRDQError):
        before = Sensitivity.load(session.folder.path)
        if before.about.get("run") == _identity(session):
            columns: dict[str, Any] = {label: [layer.cells[label] for layer in before.layers] for label in before.bits}
            return {**columns, "seconds": before.about["seconds"]}
    return {}


def _identity(session: Session) -> str:
    """A digest of everything a table depends on."""
    return hashlib.sha256((session.spec.to_json() + session.model.fingerprint()).encode()).hexdigest()[:16]


def _table(
    session: Session, targets: list[Target], columns: dict[str, list[Cell]], recorded: Recorded, seconds: float
) -> Sensitivity:
    spec = session.spec
    done = tuple(label for label in spec.bits if label in columns)
    layers = tuple(
        LayerSensitivity(
            target.layer.name, target.layer.role, target.group, target.layer.in_features, target.layer.out_features,
            {label: columns[label][index] for label in done},
        )
        for index, target in enumerate(targets)
    )  # fmt: skip
    about = {
        "model": session.model.name, "method": split_name(spec.recipes[0].name)[0], "prompts": list(spec.prompts),
        "timesteps": recorded.timesteps, "steps": spec.steps, "guidance": spec.guidance, "seed": spec.seed,
        "complete": done == spec.bits, "seconds": round(seconds, 2), "run": _identity(session),
    }  # fmt: skip
    recipes = {label: recipe for label, recipe in zip(spec.bits, spec.recipes, strict=True) if label in done}
    return Sensitivity(done, layers, recipes, about)
