"""What leaving out work of guidance costs in pictures: every way of it against the unshared pictures of the pocket model.

    python -m benchmarks.sharing --quality --prompts 32 --add

The gaps and the automatic plan come from the calibration prompts, the figures from the evaluation prompts. No times.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from trdq_core.auto_sharing import auto_sharing
from trdq_core.gaps import Similarity
from trdq_core.metrics import psnr, ssim
from trdq_core.models import load_model
from trdq_core.presets import published_sharing
from trdq_core.profiling import machine
from trdq_core.sampling import Conditioning, SampledModel, sample
from trdq_core.sharing import shared_copy
from trdq_core.sharing_plans import plan_across, plan_sharing, plan_skipping, predict, work_saving
from trdq_core.similarity import measure_similarity
from trdq_core.specs import SharingSpec
from trdq_core.timegroups import TimeGroups

PROMPTS_FILE = Path(__file__).resolve().parents[1] / "assets" / "prompts.json"
EDGES = (250.0, 500.0, 750.0)
THRESHOLDS = (0.05, 0.1, 0.2)
ACROSS = (0.1, 0.2)
SKIP_BELOW = 250.0
TARGETS_DB = (35.0,)


class Settings(NamedTuple):
    """How the pictures are sampled, and how many prompts are for what."""

    prompts: int = 32
    search_prompts: int = 8
    steps: int = 20
    guidance: float = 3.5
    seed: int = 0


class Quality(NamedTuple):
    """PSNR and SSIM of each prompt's picture under one plan."""

    psnr: list[float]
    ssim: list[float]


def stored_prompts(which: str, count: int) -> list[str]:
    """The first `count` prompts of a list in assets/prompts.json."""
    return json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))[which][:count]


def plans(model: SampledModel, similarity: Similarity, prompts: Sequence[str]) -> dict[str, SharingSpec]:
    """The plans that are compared, by name; the automatic one samples `prompts`."""
    groups, nothing = TimeGroups(EDGES), SharingSpec(edges=EDGES)
    blocks = similarity.block_error.shape[1]
    found = {"published list": predict(similarity, published_sharing(blocks))}
    for threshold in THRESHOLDS:
        found[f"threshold {threshold:g}"] = plan_sharing(similarity, groups, threshold=threshold)
    for target in TARGETS_DB:
        name = f"automatic, {target:g} dB"
        found[name] = auto_sharing(model, similarity, groups, target_db=target, prompts=prompts)
    for threshold in ACROSS:
        found[f"across steps, {threshold:g}"] = plan_across(similarity, nothing, threshold)
    for guidance in ("held", "off"):
        name = f"unconditional skipped below {SKIP_BELOW:g}, {guidance}"
        found[name] = plan_skipping(similarity, nothing, below=SKIP_BELOW, guidance=guidance)
    return found


def pictures(
    model: SampledModel, denoiser: nn.Module, conditionings: Sequence[Conditioning], settings: Settings
) -> list[np.ndarray]:
    """The picture of every prompt with one denoiser."""
    with model.using(denoiser):
        runs = [
            sample(model, conditioning, settings.seed + i, steps=settings.steps, guidance=settings.guidance)
            for i, conditioning in enumerate(conditionings)
        ]
    return [model.decode(run.latents[-1]) for run in runs]


def compare(model: SampledModel, specs: Mapping[str, SharingSpec], settings: Settings) -> dict[str, Quality]:
    """Every plan against the unshared pictures of the evaluation prompts."""
    conditionings = model.encode(stored_prompts("evaluation", settings.prompts))
    references = pictures(model, model.denoiser, conditionings, settings)
    found = {}
    for name, spec in specs.items():
        denoiser, _, _ = shared_copy(model.denoiser, model.linears(), spec, argument=model.timestep_argument)
        pairs = list(zip(pictures(model, denoiser, conditionings, settings), references, strict=True))
        found[name] = Quality([psnr(a, b) for a, b in pairs], [ssim(a, b) for a, b in pairs])
    return found


def rows_of(
    name: str, model: str, quality: Quality, spec: SharingSpec, saved: float, settings: Settings
) -> list[dict[str, object]]:
    """Rows of results.csv for one plan. PSNR leaves out identical pictures, which have none, and the note counts them."""
    found = machine()
    finite = [value for value in quality.psnr if math.isfinite(value)]
    note = f"{settings.steps} steps, guidance {settings.guidance:g}, seed {settings.seed}, full precision"
    if len(finite) < len(quality.psnr):
        note += f"; {len(quality.psnr) - len(finite)} of {len(quality.psnr)} pictures identical"
    common = {
        "date": datetime.date.today().isoformat(), "device": found["gpu"] or found["cpu"], "threads": found["threads"],
        "model": f"{model}, computing less of guidance", "recipe": name, "n": len(quality.psnr), "note": note,
        "low": "", "high": "",
    }  # fmt: skip
    attention = (spec.predicted_saving or 0.0) + (spec.across_saving or 0.0)
    rows = [
        {**common, "metric": "attention_saving", "value": round(attention, 5)},
        {**common, "metric": "work_saving", "value": round(saved, 5)},
        {**common, "metric": "ssim", **_spread(quality.ssim)},
    ]
    if finite:
        rows.append({**common, "metric": "psnr", **_spread(finite)})
        rows.append({**common, "metric": "lowest_psnr", "value": round(min(finite), 6)})
    return rows


def _spread(values: Sequence[float]) -> dict[str, float | str]:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"value": round(mean, 6)}
    spread = statistics.stdev(values)
    return {"value": round(mean, 6), "low": round(mean - spread, 6), "high": round(mean + spread, 6)}


def run(model_name: str, settings: Settings) -> list[dict[str, object]]:
    """Measure, plan, compare; prints a table and returns the rows."""
    model = load_model(model_name)
    search = stored_prompts("calibration", settings.search_prompts)
    sampling = {"steps": settings.steps, "guidance": settings.guidance, "seed": settings.seed}
    similarity = measure_similarity(model, search, **sampling)
    specs = plans(model, similarity, search)
    rows: list[dict[str, object]] = []
    print(f"{'plan':42}{'mean dB':>9}{'lowest':>9}{'SSIM':>8}{'attention':>11}{'of all':>8}")
    for name, quality in compare(model, specs, settings).items():
        spec, saved = specs[name], work_saving(similarity, specs[name])
        finite = [value for value in quality.psnr if math.isfinite(value)] or [math.inf]
        attention = (spec.predicted_saving or 0.0) + (spec.across_saving or 0.0)
        print(
            f"{name:42}{statistics.fmean(finite):>9.2f}{min(finite):>9.2f}{statistics.fmean(quality.ssim):>8.4f}"
            f"{attention:>11.4f}{saved:>8.4f}",
            flush=True,
        )
        rows += rows_of(name, model_name, quality, spec, saved, settings)
    return rows
