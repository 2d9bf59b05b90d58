"""The commands that compare nothing: calibrate, sample, attention."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from trdq_core.auto_sharing import fulfil
from trdq_core.execution.rows import REFERENCE, changed_row
from trdq_core.execution.samples import sample_all
from trdq_core.session import Session, convert_for, statistics_for
from trdq_core.similarity import Similarity, measure_similarity
from trdq_core.specs import Recipe


def calibrate(session: Session, report: dict[str, Any]) -> None:
    """Statistics, stored for later runs; for each recipe given also its fit."""
    statistics = statistics_for(session, report)
    for recipe in session.spec.recipes:
        if recipe.fitted:
            started = time.monotonic()
            facts = convert_for(session, recipe, statistics).facts()
            report["recipes"][recipe.name] = {
                "kind": "quantized",
                "fit_seconds": round(time.monotonic() - started, 2),
                **facts,
            }


def sample_prompts(session: Session, report: dict[str, Any]) -> None:
    """Pictures or clips of every prompt with the first recipe."""
    recipe = session.spec.recipes[0] if session.spec.recipes else Recipe(name=REFERENCE)
    session.conditionings = session.model.encode(session.spec.prompts)
    if not recipe.changes:
        samples = sample_all(session, REFERENCE, session.model.denoiser)
        report["recipes"][REFERENCE] = {"kind": "reference", "label": report["reference"]["label"], **samples.row()}
        return
    conversion = convert_for(session, recipe, statistics_for(session, report) if recipe.fitted else None)
    samples = sample_all(session, recipe.name, conversion.denoiser)
    report["recipes"][recipe.name] = changed_row(session, conversion, samples)


def attention(session: Session, report: dict[str, Any]) -> None:
    """How alike the guidance branches attend, and what a step changes, over some prompts; and the plan that is wished for."""
    spec, wish = session.spec, session.spec.sharing
    prompts = spec.prompts or spec.calibration_prompts
    session.stage("attention", f"Comparing the attention of both branches on {len(prompts)} prompts")
    similarity = measure_similarity(
        session.model, prompts, steps=spec.steps, guidance=spec.guidance, seed=spec.seed,
        on_event=session.folder.emit, cancelled=session.cancelled,
    )  # fmt: skip
    similarity.save(session.folder.path)
    report["similarity"] = _means(similarity)
    if similarity.temporal is not None:
        report["similarity"]["temporal"] = _means(similarity.temporal)
    for name in ("guidance_change", "guidance_share"):
        report["similarity"][name] = _without_nan(getattr(similarity, name))
    if wish is not None and wish.wished:
        if wish.target_psnr_db is not None:
            session.stage("search", f"Looking for the most sharing that keeps {wish.target_psnr_db:g} dB")
        reports = {"on_event": session.folder.emit, "cancelled": session.cancelled}
        plan = fulfil(session.model, similarity, wish, prompts=prompts, **reports)
        session.folder.write("plan.json", plan.to_json())
        report["similarity"]["plan"] = plan.to_dict()


def _means(similarity: Similarity) -> dict[str, Any]:
    """A measurement in a few numbers, and means over the steps for each block."""
    return {
        "map_cosine": float(similarity.map_cosine.mean()),
        "output_error": float(similarity.block_error.mean()),
        "block_error": similarity.block_error.mean(0).tolist(),
        "step_error": _without_nan(similarity.step_error),
    }


def _without_nan(values: Tensor) -> list[float]:
    """Means over the steps for each block, or values of each step; the first step, which has none before it, left out."""
    kept = values[~values.isnan().flatten(1).any(1)] if values.ndim > 1 else values[~values.isnan()]
    return (kept.mean(0) if kept.ndim > 1 else kept).tolist()
