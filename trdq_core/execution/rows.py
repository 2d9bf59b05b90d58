"""The rows of a report: what a recipe is and weighs, and how far what it sampled is from the reference."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from trdq_core import metrics, profiling
from trdq_core.convert import Conversion
from trdq_core.execution.samples import Samples
from trdq_core.nn.modules import module_bytes
from trdq_core.peers.convert import PeerConversion
from trdq_core.plan import rule_for
from trdq_core.session import Session, convert_for
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics

REFERENCE, NOISE_FLOOR = "fp", "fp-again"


def changed_row(session: Session, conversion: Conversion | PeerConversion, samples: Samples) -> dict[str, Any]:
    """Facts and measurements of a recipe; a simulated one has no times, since they are those of no kernel."""
    facts = facts_of(session, conversion)
    times = {"end_to_end_ms": None} if facts["simulated"] else {}
    return {**facts, **samples.row(), **times}


def measured_conversion(
    session: Session, recipe: Recipe, statistics: Statistics | None
) -> tuple[Conversion | PeerConversion, dict[str, Any]]:
    """The changed denoiser, and of the work on it seconds and peak resident memory of the process."""
    profiling.reset_peak_memory()
    started = time.perf_counter()
    conversion = convert_for(session, recipe, statistics)
    seconds = round(time.perf_counter() - started, 2)
    return conversion, {"fit_seconds": seconds, "convert_peak_rss_bytes": profiling.peak_rss_bytes()}


def facts_of(session: Session, conversion: Conversion | PeerConversion) -> dict[str, Any]:
    """The kind of a row and the facts of its conversion; without quantization its layers weigh what the reference's do."""
    bf16 = {"bf16_file_bytes": bf16_bytes(session)}
    if conversion.recipe.fitted:
        return {"kind": "quantized", **conversion.facts(), **bf16}
    quantized = [recipe for recipe in session.spec.recipes if recipe.quantized]
    if isinstance(conversion, PeerConversion):
        return {**fp_bytes(session, quantized), **conversion.facts()}
    return {"kind": "shared", **conversion.facts(), **fp_bytes(session, quantized)}


def bf16_bytes(session: Session) -> int:
    """What the whole unquantized denoiser takes in a file at two bytes a weight, as most models are published."""
    return 2 * sum(parameter.numel() for parameter in session.model.denoiser.parameters())


def fp_bytes(session: Session, recipes: list[Recipe]) -> dict[str, Any]:
    """What the layers that get quantized weigh in full precision, counted as the quantized rows count theirs."""
    layers = session.model.linears()
    counted = [layer for layer in layers if any(rule_for(layer, recipe) for recipe in recipes)]
    size = torch.finfo(session.model.dtype).bits // 8
    weight_bytes = sum(size * layer.in_features * layer.out_features for layer in counted)
    return {
        "weight_bytes": weight_bytes,
        "fp_weight_bytes": weight_bytes,
        "resident_bytes": module_bytes(session.model.denoiser),
        "file_bytes": module_bytes(session.model.denoiser),
        "bf16_file_bytes": bf16_bytes(session),
        "disk_bytes": 0,
        "effective_bits": float(8 * size),
        "kernels": {f"{str(session.model.dtype).removeprefix('torch.')} linear": len(counted or layers)},
        "simulated": False,
        "rejected": [],
    }


def quality(session: Session, samples: Samples) -> dict[str, Any]:
    """PSNR and SSIM of the pictures or clips, SQNR of the latents after each step: means over prompts, with spread."""
    pairs = zip(samples.outputs, session.pictures, strict=True)
    found = [metrics.likeness(session.outputs.load(output), reference) for output, reference in pairs]
    psnrs, ssims = [one.psnr for one in found], [one.ssim for one in found]
    clips = [one.clip for one in found if one.clip is not None]
    curves = [metrics.latent_sqnr_db(run, ref) for run, ref in zip(samples.runs, session.references, strict=True)]
    curve = [metrics.finite_mean(values) for values in zip(*curves, strict=True)]
    return {
        "n": len(found),
        "identical": all(math.isinf(value) for value in psnrs),
        "psnr": metrics.finite_mean(psnrs),
        "psnr_std": _spread(psnrs),
        "ssim": sum(ssims) / len(ssims),
        "ssim_std": _spread(ssims),
        **(metrics.clip_row(clips) if clips else {}),
        "latent_sqnr_db": curve,
        "mean_latent_sqnr_db": metrics.finite_mean([v for v in curve if v is not None]),
        "final_latent_sqnr_db": curve[-1],
    }


def _spread(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else None
