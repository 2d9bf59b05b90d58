"""The evaluate command: one reference, then one row for each recipe, each written as soon as it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trdq_core import metrics
from trdq_core.bitwidths import bits_of, split_name
from trdq_core.convert import Conversion
from trdq_core.errors import Cancelled, RecipeError, StorageError, TRDQError
from trdq_core.evaluation import tables
from trdq_core.evaluation.references import (
    REFERENCE,
    References,
    batch_size,
    decode_all,
    make_references,
    reference_digest,
    sample_references,
)
from trdq_core.evaluation.scores import Scores
from trdq_core.outputs import Output, output_fields
from trdq_core.peers.convert import PeerConversion
from trdq_core.session import Session, check_plan, convert_for, statistics_for
from trdq_core.specs import Recipe, RunSpec
from trdq_core.statistics import Statistics

NOISE_FLOOR = "fp-again"
SHOWN = 8  # pictures of each recipe that are saved, for people to look at


def evaluate(session: Session, report: dict[str, Any]) -> None:
    """Measure every recipe of the run against the reference; rows of an earlier start of the same run are kept.

    A recipe that cannot be done is a row with the sentence that says why, and the others go on.
    """
    spec, model = session.spec, session.model
    if not spec.prompts:
        raise RecipeError("prompts: there are none; give at least one prompt to evaluate recipes on.")
    recipes = [recipe for recipe in spec.recipes if recipe.changes]
    report["evaluation"] = {
        "prompts": len(spec.prompts), "seeds": spec.seeds, "pictures": len(spec.prompts) * spec.seeds,
        "batch": batch_size(model),
        "reference": reference_digest(model, spec),
    }  # fmt: skip
    _go_on(session, report)
    _refuse(session, report, recipes)
    session.conditionings = model.encode(spec.prompts)
    references = make_references(session, report["reference"]["label"])
    rows = report["recipes"]
    left = [recipe for recipe in recipes if recipe.name not in rows]  # neither done before nor refused
    if REFERENCE not in rows:
        rows[REFERENCE] = _reference_row(session, references, report["reference"]["label"])
        _write(session, report)
    if NOISE_FLOOR not in rows:
        session.stage("sample", "Sampling the reference again for the noise floor", NOISE_FLOOR)
        _finish(session, report, NOISE_FLOOR, {"kind": "noise_floor", "label": "again"}, references, model.denoiser)
    statistics = statistics_for(session, report) if any(recipe.fitted for recipe in left) else None
    started = time.monotonic()
    for index, recipe in enumerate(left):
        words = _position(len(recipes) - len(left) + index + 1, len(recipes), index, len(left), started)
        try:
            _evaluate_recipe(session, report, recipe, statistics, references, words)
        except (Cancelled, StorageError):
            raise
        except TRDQError as error:
            _fail(session, report, recipe, str(error))
    report["recipes"] = {name: rows[name] for name in (REFERENCE, NOISE_FLOOR, *(r.name for r in recipes))}
    _write(session, report)


def _go_on(session: Session, report: dict[str, Any]) -> None:
    """Take over what an earlier start of this very run finished; failed recipes are tried again."""
    try:
        before = json.loads((session.folder.path / "report.json").read_text())
        same = (
            RunSpec.from_dict(before["spec"]) == session.spec
            and before["evaluation"]["reference"] == report["evaluation"]["reference"]
        )
        rows = {name: row for name, row in before["recipes"].items() if row["kind"] != "failed"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if not same:
        text = "The run folder holds an evaluation of other settings or another model; it is made anew."
        session.folder.emit({"kind": "warning", "text": text})
        return
    report["recipes"], report["calibration"] = rows, before.get("calibration")
    done = [name for name in rows if name not in (REFERENCE, NOISE_FLOOR)]
    session.stage("load", f"Going on with an evaluation: {len(done)} of {len(session.spec.recipes)} recipes are done")


def _refuse(session: Session, report: dict[str, Any], recipes: Sequence[Recipe]) -> None:
    """Rows of the recipes that some layer cannot take, before hours go into the others; the error itself if that is all."""
    refused: list[TRDQError] = []
    for recipe in recipes:
        if recipe.name in report["recipes"]:  # done by an earlier start
            continue
        try:
            check_plan(session, recipe)
        except TRDQError as error:
            refused.append(error)
            _fail(session, report, recipe, str(error))
    if refused and len(refused) == len(recipes):
        raise refused[0]


def _reference_row(session: Session, references: References, label: str) -> dict[str, Any]:
    """The row of the reference; its first pictures are saved."""
    saved: list[Output] = []
    for _, stored in references:
        _show(session, REFERENCE, stored.pictures, saved)
    bits = float(torch.finfo(session.model.dtype).bits)
    return {
        "kind": "reference", "label": label, "n": len(references.samples), "effective_bits": bits, "packed_bits": bits,
        "simulated": False, **output_fields(saved),
    }  # fmt: skip


def _show(session: Session, name: str, pictures: np.ndarray, saved: list[Output]) -> None:
    """Save the first pictures or clips of a recipe, the first seed of each prompt, into the run folder and into `saved`."""
    for picture in pictures[: max(0, min(SHOWN, len(session.spec.prompts)) - len(saved))]:
        saved.append(session.outputs.save(name, len(saved), picture))


def _evaluate_recipe(
    session: Session,
    report: dict[str, Any],
    recipe: Recipe,
    statistics: Statistics | None,
    references: References,
    words: str,
) -> None:
    started = time.monotonic()
    conversion = convert_for(session, recipe, statistics)
    row = {
        **_names(recipe),
        "kind": "quantized" if recipe.quantized else "shared",
        "fit_seconds": round(time.monotonic() - started, 2),
        "calibration_seconds": report["calibration"]["seconds"] if recipe.fitted else None,
        **_facts(session, conversion),
    }
    session.stage("sample", f"Sampling {recipe.name}, {words}", recipe.name)
    _finish(session, report, recipe.name, row, references, conversion.denoiser)


def _facts(session: Session, conversion: Conversion | PeerConversion) -> dict[str, Any]:
    """What is known of a conversion; one that quantizes nothing has the reference's weights."""
    facts = conversion.facts()
    if conversion.recipe.quantized:
        return facts
    bits = float(torch.finfo(session.model.dtype).bits)
    return {**facts, "effective_bits": bits, "packed_bits": bits}


def _names(recipe: Recipe) -> dict[str, str]:
    return {"method": split_name(recipe.name)[0], "bits": bits_of(recipe)}


def _finish(
    session: Session,
    report: dict[str, Any],
    name: str,
    row: Mapping[str, Any],
    references: References,
    denoiser: nn.Module,
) -> None:
    """Sample and measure with one denoiser, and write the row."""
    scores, seconds, saved = _measure(session, name, denoiser, references)
    each = None if row.get("simulated") else round(seconds / len(references.samples), 4)
    quality = scores.row(references.samples)
    report["recipes"][name] = {**row, **quality, "denoise_seconds_per_picture": each, **output_fields(saved)}
    session.folder.write(f"samples/{name}.csv", scores.samples_csv(references.samples))
    session.folder.emit({"kind": "result", "recipe": name, "metrics": dict(report["recipes"][name])})
    _write(session, report)


def _measure(
    session: Session, name: str, denoiser: nn.Module, references: References
) -> tuple[Scores, float, list[Output]]:
    """Scores of all samples, the seconds that denoising took, and the pictures that were saved."""
    spec, scores = session.spec, Scores()
    saved: list[Output] = []
    progress = session.progress("sample", len(references.batches) * spec.steps, name)
    seconds = 0.0
    with session.model.using(denoiser):
        for batch, stored in references:
            steps: list[list[float]] = []
            outside = 0.0

            def look(step: int, timestep: float, latents: Tensor, steps: list = steps, stored: Any = stored) -> None:
                nonlocal outside
                entered = time.perf_counter()
                if not torch.isfinite(latents).all():
                    raise RecipeError(f"{name}: its latents are not finite after step {step + 1}; use more bits.")
                exact = stored.latents[step].to(latents.device)
                steps.append([metrics.sqnr_db(own, other) for own, other in zip(latents, exact, strict=True)])
                progress.advance(f"picture {len(scores.psnr) + 1} and on")
                outside += time.perf_counter() - entered

            started = time.perf_counter()
            final = sample_references(session, batch, look)
            seconds += time.perf_counter() - started - outside
            pictures = decode_all(session.model, final)
            scores.add(session.model, pictures, stored, list(zip(*steps, strict=True)))
            _show(session, name, pictures, saved)
    return scores, seconds, saved


def _fail(session: Session, report: dict[str, Any], recipe: Recipe, text: str) -> None:
    report["recipes"][recipe.name] = {"kind": "failed", **_names(recipe), "error": text}
    session.folder.emit({"kind": "warning", "text": f"{recipe.name} is left out: {text}"})
    _write(session, report)


def _position(number: int, total: int, done: int, left: int, started: float) -> str:
    """ "3 of 70, about 12 min left": which recipe this is, and how long the rest will take at the pace so far."""
    if not done:
        return f"{number} of {total}"
    minutes = (time.monotonic() - started) / done * (left - done) / 60
    return f"{number} of {total}, about {minutes:.0f} min left" if minutes >= 1 else f"{number} of {total}"


def _write(session: Session, report: Mapping[str, Any]) -> None:
    """The report and its tables; everything there so far."""
    session.folder.write_report(report)
    session.folder.write("evaluation.json", json.dumps(report, indent=1, allow_nan=False))
    session.folder.write("evaluation.csv", tables.csv_text(report))
    session.folder.write("evaluation.md", tables.markdown(report))
