"""What a step takes: all variants timed in turn; and the profile command, which needs no pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from trdq_core import branches, profiling
from trdq_core.convert import Conversion
from trdq_core.errors import PeerError
from trdq_core.execution.rows import NOISE_FLOOR, REFERENCE, facts_of, fp_bytes, measured_conversion
from trdq_core.peers.convert import PeerConversion
from trdq_core.sampling import sample
from trdq_core.session import Session, failed_row, statistics_for
from trdq_core.step_profile.command import decode_ms, memory_of, profile_steps


def time_steps(
    session: Session, report: dict[str, Any], conversions: Mapping[str, Conversion | PeerConversion]
) -> dict[str, Any]:
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
        # By round as well: a speedup is the median of what the rounds say, each under the same noise.
        report["recipes"][name] |= {"step_ms": profiling.summary(values), "round_ms": [round(ms, 4) for ms in values]}
    for row in report["recipes"].values():
        if row["simulated"]:
            row["step_ms"] = row["round_ms"] = None
    return middle


def profile(session: Session, report: dict[str, Any]) -> None:
    """Latency, bytes and peak memory of a step, with no word on quality: works on random weights too."""
    spec, model = session.spec, session.model
    changed = [recipe for recipe in spec.recipes if recipe.changes]
    quantized = [recipe for recipe in changed if recipe.quantized]
    prompts = spec.prompts[:1] or spec.calibration_prompts[:1]
    started = time.perf_counter()
    session.conditionings = model.encode(prompts)
    report["encode_ms"] = round(1000 * (time.perf_counter() - started), 3)
    report["recipes"][REFERENCE] = {
        "kind": "reference",
        "label": report["reference"]["label"],
        **fp_bytes(session, quantized),
    }
    conversions: dict[str, Conversion | PeerConversion] = {}
    statistics = statistics_for(session, report) if any(recipe.fitted for recipe in changed) else None
    for recipe in changed:
        try:
            conversions[recipe.name], measured = measured_conversion(session, recipe, statistics)
            report["recipes"][recipe.name] = {**measured, **facts_of(session, conversions[recipe.name])}
        except PeerError as error:
            report["recipes"][recipe.name] = failed_row(session, error)
    call = time_steps(session, report, conversions)
    denoisers = {REFERENCE: model.denoiser, **{name: c.denoiser for name, c in conversions.items()}}
    session.folder.write_report(report)
    profile_steps(session, report, denoisers, call)
    _whole_runs(session, report, conversions)


def _whole_runs(
    session: Session, report: dict[str, Any], conversions: Mapping[str, Conversion | PeerConversion]
) -> None:
    """One run of each row: its time, peak memory and swaps; and the decoder on what the reference made."""
    spec, model = session.spec, session.model
    for name, row in report["recipes"].items():
        if row["kind"] == "failed":
            continue
        denoiser = conversions[name].denoiser if name in conversions else model.denoiser
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
