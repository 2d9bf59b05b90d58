"""How each command runs: load, calibrate or reuse, convert, sample, measure, report."""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trdq_core import branches, metrics, profiling
from trdq_core.auto_sharing import fulfil
from trdq_core.convert import Conversion
from trdq_core.errors import RecipeError
from trdq_core.evaluation.command import evaluate
from trdq_core.events import Progress
from trdq_core.folders import RunFolder
from trdq_core.kernels import dispatch
from trdq_core.models import load_model
from trdq_core.nn.modules import module_bytes
from trdq_core.plan import rule_for
from trdq_core.sampling import Trajectory, sample
from trdq_core.sensitivity.command import sensitivity
from trdq_core.session import Session, changes, convert_for, statistics_for
from trdq_core.similarity import measure_similarity
from trdq_core.specs import Recipe, RunSpec
from trdq_core.step_profile.command import decode_ms, memory_of, profile_steps

REPORT_VERSION = 1
PREVIEW_EVERY = 2  # steps between two previews of the first prompt
REFERENCE, NOISE_FLOOR = "fp", "fp-again"


def execute(spec: RunSpec, folder: RunFolder, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Do what `spec` says; the report is written as soon as there is something to report, and after each recipe."""
    folder.emit({"kind": "stage", "stage": "load", "label": f"Loading {spec.model}", "recipe": None})
    model = load_model(spec.model)
    session = Session(spec, folder, cancelled, model, dispatch.select_backend(model.device, spec.backend))
    report = _header(session)
    commands = {"calibrate": _calibrate, "sample": _sample, "compare": _compare, "profile": _profile}
    commands |= {"attention": _attention, "evaluate": evaluate, "sensitivity": sensitivity}
    try:
        commands[spec.command](session, report)
    finally:
        folder.write_report(report)
    return report


def _header(session: Session) -> dict[str, Any]:
    model, spec = session.model, session.spec
    gpu = model.device.type == "cuda"
    return {
        "format_version": REPORT_VERSION,
        "command": spec.command,
        "model": spec.model,
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "reference": {
            "label": "FP16" if gpu else "FP32",
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        },
        "machine": profiling.machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")},
        },
        "spec": spec.to_dict(),
        "kernel_backend": dispatch.describe(model.device),
        "calibration": None,
        "prompts": list(spec.prompts),
        "recipes": {},
    }


def _calibrate(session: Session, report: dict[str, Any]) -> None:
    statistics = statistics_for(session, report)
    for recipe in session.spec.recipes:
        if recipe.quantized:
            started = time.monotonic()
            facts = convert_for(session, recipe, statistics).facts()
            report["recipes"][recipe.name] = {
                "kind": "quantized",
                "fit_seconds": round(time.monotonic() - started, 2),
                **facts,
            }


def _sample(session: Session, report: dict[str, Any]) -> None:
    recipe = session.spec.recipes[0] if session.spec.recipes else Recipe(name=REFERENCE)
    session.conditionings = session.model.encode(session.spec.prompts)
    if not changes(recipe):
        _, row = _sample_all(session, REFERENCE, session.model.denoiser)
        report["recipes"][REFERENCE] = {"kind": "reference", "label": report["reference"]["label"], **row}
        return
    conversion = convert_for(session, recipe, statistics_for(session, report) if recipe.quantized else None)
    _, row = _sample_all(session, recipe.name, conversion.denoiser)
    report["recipes"][recipe.name] = _changed_row(session, conversion, row)


def _facts(session: Session, conversion: Conversion) -> dict[str, Any]:
    """The kind of a row and the facts of its conversion; without quantization its layers weigh what the reference's do."""
    if conversion.recipe.quantized:
        return {"kind": "quantized", **conversion.facts()}
    quantized = [recipe for recipe in session.spec.recipes if recipe.quantized]
    return {"kind": "shared", **conversion.facts(), **_fp_bytes(session, quantized)}


def _attention(session: Session, report: dict[str, Any]) -> None:
    """How alike the guidance branches attend, and what a step changes, over some prompts; and the plan that is wished for."""
    spec, wish = session.spec, session.spec.sharing
    prompts = spec.prompts or spec.calibration_prompts
    session.stage("attention", f"Comparing the attention of both branches on {len(prompts)} prompts")
    similarity = measure_similarity(
        session.model, prompts, steps=spec.steps, guidance=spec.guidance, seed=spec.seed,
        on_event=session.folder.emit, cancelled=session.cancelled,
    )  # fmt: skip
    similarity.save(session.folder.path)
    report["similarity"] = {
        "map_cosine": float(similarity.map_cosine.mean()),
        "output_error": float(similarity.block_error.mean()),
        "block_error": similarity.block_error.mean(0).tolist(),
    }
    for name in ("step_error", "guidance_change", "guidance_share"):
        report["similarity"][name] = _without_nan(getattr(similarity, name))
    if wish is not None and wish.wished:
        if wish.target_psnr_db is not None:
            session.stage("search", f"Looking for the most sharing that keeps {wish.target_psnr_db:g} dB")
        reports = {"on_event": session.folder.emit, "cancelled": session.cancelled}
        plan = fulfil(session.model, similarity, wish, prompts=prompts, **reports)
        session.folder.write("plan.json", plan.to_json())
        report["similarity"]["plan"] = plan.to_dict()


def _without_nan(values: Tensor) -> list[float]:
    """Means over the steps for each block, or values of each step; the first step, which has none before it, left out."""
    kept = values[~values.isnan().flatten(1).any(1)] if values.ndim > 1 else values[~values.isnan()]
    return (kept.mean(0) if kept.ndim > 1 else kept).tolist()


def _compare(session: Session, report: dict[str, Any]) -> None:
    spec, model = session.spec, session.model
    if not spec.prompts:
        raise RecipeError("prompts: there are none; give at least one prompt to compare pictures of.")
    changed = [recipe for recipe in spec.recipes if changes(recipe)]
    quantized = [recipe for recipe in changed if recipe.quantized]
    session.conditionings = model.encode(spec.prompts)
    rows = report["recipes"]
    fp_bytes = _fp_bytes(session, quantized)
    session.stage("reference", f"Sampling {report['reference']['label']}", REFERENCE)
    session.references, row = _sample_all(session, REFERENCE, model.denoiser, keep_pictures=True)
    rows[REFERENCE] = {"kind": "reference", "label": report["reference"]["label"], **fp_bytes, **row}
    session.folder.emit({"kind": "result", "recipe": REFERENCE, "metrics": dict(rows[REFERENCE])})
    session.folder.write_report(report)
    session.stage("reference", "Sampling the reference again for the noise floor", NOISE_FLOOR)
    runs, row = _sample_all(session, NOISE_FLOOR, model.denoiser)
    rows[NOISE_FLOOR] = {
        "kind": "noise_floor",
        "label": "again",
        **fp_bytes,
        **row,
        **_quality(session, NOISE_FLOOR, runs),
    }
    session.folder.write_report(report)
    statistics = statistics_for(session, report) if quantized else None
    conversions: dict[str, Conversion] = {}
    for recipe in changed:
        conversion = convert_for(session, recipe, statistics)
        session.stage("sample", f"Sampling {recipe.name}", recipe.name)
        runs, row = _sample_all(session, recipe.name, conversion.denoiser)
        rows[recipe.name] = {**_changed_row(session, conversion, row), **_quality(session, recipe.name, runs)}
        conversions[recipe.name] = conversion
        session.folder.emit({"kind": "result", "recipe": recipe.name, "metrics": dict(rows[recipe.name])})
        session.folder.write_report(report)
    _time_steps(session, report, conversions)


def _changed_row(session: Session, conversion: Conversion, row: Mapping[str, Any]) -> dict[str, Any]:
    """Facts and measurements of a recipe; a simulated one has no times, since they are those of no kernel."""
    facts = _facts(session, conversion)
    times = {"end_to_end_ms": None} if facts["simulated"] else {}
    return {**facts, **row, **times}


def _fp_bytes(session: Session, recipes: list[Recipe]) -> dict[str, Any]:
    """What the layers that get quantized weigh in full precision, counted as the quantized rows count theirs."""
    layers = session.model.linears()
    counted = [layer for layer in layers if any(rule_for(layer, recipe) for recipe in recipes)]
    size = torch.finfo(session.model.dtype).bits // 8
    weight_bytes = sum(size * layer.in_features * layer.out_features for layer in counted)
    return {
        "weight_bytes": weight_bytes,
        "fp_weight_bytes": weight_bytes,
        "resident_bytes": module_bytes(session.model.denoiser),
        "disk_bytes": 0,
        "effective_bits": float(8 * size),
        "kernels": {f"{str(session.model.dtype).removeprefix('torch.')} linear": len(counted or layers)},
        "simulated": False,
        "rejected": [],
    }


def _sample_all(
    session: Session, name: str, denoiser: nn.Module, *, keep_pictures: bool = False
) -> tuple[list[Trajectory], dict[str, Any]]:
    """Sample and decode every prompt with one denoiser. The row holds pictures, end-to-end times and peak memory."""
    spec, model = session.spec, session.model
    progress = session.progress("sample", len(session.conditionings) * spec.steps, name)
    runs, files, milliseconds = [], [], []
    profiling.reset_peak_memory()
    with model.using(denoiser):
        for index, conditioning in enumerate(session.conditionings):
            on_step = _stepper(session, name, index, progress)
            run = sample(
                model, conditioning, spec.seed + index, steps=spec.steps, guidance=spec.guidance, on_step=on_step
            )
            started = time.perf_counter()
            picture = model.decode(run.latents[-1])
            milliseconds.append(1000 * (run.seconds + time.perf_counter() - started))
            files.append(session.folder.save_picture(f"images/{name}_{index:03d}.png", picture))
            session.folder.emit({"kind": "image", "recipe": name, "prompt": index, "image": files[-1]})
            if keep_pictures:
                session.pictures.append(picture)
            runs.append(run)
    return runs, {
        "images": files,
        "end_to_end_ms": profiling.summary(milliseconds),
        "peak_rss_bytes": profiling.peak_rss_bytes(),
    }


def _stepper(session: Session, name: str, index: int, progress: Progress) -> Callable[[int, float, Tensor], None]:
    """What happens after each sampler step: progress, a look at Cancel, and now and then a preview of the first prompt."""
    spec = session.spec

    def on_step(step: int, timestep: float, latents: Tensor) -> None:
        progress.advance(session.conditionings[index].prompt)
        if index == 0 and name != NOISE_FLOOR and step % PREVIEW_EVERY == 0 and step < spec.steps - 1:
            path = f"previews/{name}_{step:03d}.jpg"
            session.folder.save_picture(path, session.model.decode(latents))
            session.folder.emit(
                {"kind": "preview", "recipe": name, "prompt": 0, "step": step + 1, "steps": spec.steps, "image": path}
            )

    return on_step


def _quality(session: Session, name: str, runs: list[Trajectory]) -> dict[str, Any]:
    """PSNR and SSIM of the pictures, SQNR of the latents after each step: means over prompts, with spread."""
    pairs = [
        (np.asarray(Image.open(session.folder.path / f"images/{name}_{i:03d}.png")), reference)
        for i, reference in enumerate(session.pictures)
    ]
    psnrs = [metrics.psnr(a, b) for a, b in pairs]
    ssims = [metrics.ssim(a, b) for a, b in pairs]
    curves = [metrics.latent_sqnr_db(run, ref) for run, ref in zip(runs, session.references, strict=True)]
    curve = [metrics.finite_mean(values) for values in zip(*curves, strict=True)]
    return {
        "n": len(pairs),
        "identical": all(math.isinf(value) for value in psnrs),
        "psnr": metrics.finite_mean(psnrs),
        "psnr_std": _spread(psnrs),
        "ssim": sum(ssims) / len(ssims),
        "ssim_std": _spread(ssims),
        "latent_sqnr_db": curve,
        "mean_latent_sqnr_db": metrics.finite_mean([v for v in curve if v is not None]),
        "final_latent_sqnr_db": curve[-1],
    }


def _spread(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else None


def _time_steps(session: Session, report: dict[str, Any], conversions: Mapping[str, Conversion]) -> dict[str, Any]:
    """Latency of one denoiser call, all variants interleaved on the same recorded inputs, which are given back."""
    spec, model = session.spec, session.model
    session.stage("measure", "Timing one denoiser step, all columns in turn")
    calls = profiling.record_inputs(
        model.denoiser,
        lambda: sample(model, session.conditionings[0], spec.seed, steps=spec.steps, guidance=spec.guidance),
    )
    middle = calls[len(calls) // 2]
    # The reference stands in the round twice where there is a noise floor: its two times differ by chance alone.
    references = [name for name in (REFERENCE, NOISE_FLOOR) if name in report["recipes"]]
    denoisers = {**dict.fromkeys(references, model.denoiser), **{name: c.denoiser for name, c in conversions.items()}}
    progress = session.progress("measure", spec.timing_rounds)
    with branches.joint() if spec.guidance > 1 else branches.single():
        times = profiling.time_interleaved(
            {name: (lambda d=denoiser: d(**middle)) for name, denoiser in denoisers.items()},
            spec.timing_rounds,
            after_round=lambda: progress.advance("round"),
        )
    for name, values in times.items():
        report["recipes"][name]["step_ms"] = profiling.summary(values)
    for row in report["recipes"].values():
        if row["simulated"]:
            row["step_ms"] = None
    return middle


def _profile(session: Session, report: dict[str, Any]) -> None:
    """Latency, bytes and peak memory of a step, with no word on quality: works on random weights too."""
    spec, model = session.spec, session.model
    changed = [recipe for recipe in spec.recipes if changes(recipe)]
    quantized = [recipe for recipe in changed if recipe.quantized]
    prompts = spec.prompts[:1] or spec.calibration_prompts[:1]
    started = time.perf_counter()
    session.conditionings = model.encode(prompts)
    report["encode_ms"] = round(1000 * (time.perf_counter() - started), 3)
    report["recipes"][REFERENCE] = {
        "kind": "reference",
        "label": report["reference"]["label"],
        **_fp_bytes(session, quantized),
    }
    conversions = {}
    statistics = statistics_for(session, report) if quantized else None
    for recipe in changed:
        conversions[recipe.name] = convert_for(session, recipe, statistics)
        report["recipes"][recipe.name] = _facts(session, conversions[recipe.name])
    call = _time_steps(session, report, conversions)
    denoisers = {REFERENCE: model.denoiser, **{name: c.denoiser for name, c in conversions.items()}}
    session.folder.write_report(report)
    profile_steps(session, report, denoisers, call)
    for name, row in report["recipes"].items():
        denoiser = denoisers[name]
        profiling.reset_peak_memory()
        with model.using(denoiser):
            run = sample(model, session.conditionings[0], spec.seed, steps=spec.steps, guidance=spec.guidance)
        row["peak_rss_bytes"] = profiling.peak_rss_bytes()
        row["denoise_ms"] = None if row["simulated"] else round(1000 * run.seconds, 3)
        row["memory"] = memory_of(row, report["recipes"][REFERENCE])
        if name == REFERENCE:
            report["decode_ms"] = decode_ms(session, run)
        conversion = conversions.get(name)
        if conversion is not None and conversion.switched is not None:
            row["swap_ms"] = profiling.summary([1000 * s for s in conversion.switched.swap_seconds] or [0.0])
