"""Readouts as HTML. Every text that a person or a file may have written is escaped here."""

from __future__ import annotations

from html import escape
from typing import Any

from studio.components import words
from studio.jobs import Job
from studio.services.machine import MachineFacts
from studio.services.peers import version_of
from studio.services.stored import psnr_text
from studio.state import Progress

STAGE_TITLES = {
    "load": "Load", "calibrate": "Calibrate", "fit": "Fit", "reference": "Reference", "sample": "Sample",
    "measure": "Measure", "attention": "Attention", "download": "Download", "save": "Save",
}  # fmt: skip

PART_OF = {"observe": "fit", "reconstruct": "fit"}  # stages that only some methods have


def header(facts: MachineFacts, backend: str, jobs: int, running: str) -> str:
    """The strip at the top: what this machine is and how busy it is."""
    queue = "idle" if jobs == 0 else f"{escape(running or 'busy')} · {jobs} in line"
    items = (
        ("Device", escape(facts.device)),
        ("Threads", str(facts.threads)),
        ("RAM", f"{words.size(facts.ram_free)} free of {words.size(facts.ram_total)}"),
        ("Studio", words.size(facts.own_bytes)),
        ("Kernels", escape(backend)),
        ("Model", f'<span class="tr-dot {"busy" if jobs else ""}"></span>{queue}'),
    )
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items)
    brand = '<div class="tr-brand"><b>TR-DQ</b> Studio<span>quantize a diffusion transformer and look</span></div>'
    return f'<div class="tr-header">{brand}<dl>{cells}</dl></div>'


def notice(text: str, kind: str = "error") -> str:
    """One sentence in a box; nothing for an empty text. `kind`: error, warning, info, done."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="tr-notice {kind}" role="{role}">{escape(text)}</div>'


def idle(text: str) -> str:
    """The progress strip when nothing runs."""
    return f'<div class="tr-strip idle" role="status">{escape(text)}</div>'


def waiting(title: str, place: int, running: str) -> str:
    """The progress strip of a job in the line."""
    before = "1 job is" if place == 1 else f"{place} jobs are"
    now = f" Running now: {escape(running)}." if running else ""
    return (
        f'<div class="tr-strip waiting" role="status"><b>{escape(title)}</b>'
        f"<span>You are number {place} in line: {before} before yours.{now}</span></div>"
    )


def progress(view: Progress, job: Job) -> str:
    """The progress strip of a running job."""
    share = view.done / view.total if view.total else 0.0
    steps = "".join(_stage(name, view.stage) for name in view.stages)
    parts = [escape(view.recipe), escape(view.label), escape(view.detail)]
    said = " · ".join(dict.fromkeys(part for part in parts if part)) or "starting"
    count = f"{view.done} / {view.total}" if view.total else ""
    left = f"about {words.duration(view.eta_seconds)} left in this stage" if view.eta_seconds is not None else ""
    after = "stopping…" if job.cancelling else left
    busy = "" if view.total else " endless"
    return (
        f'<div class="tr-strip running" role="status"><div class="tr-strip-top"><b>{escape(view.title)}</b>'
        f'<span class="tr-stages">{steps}</span><span class="tr-clock">{words.duration(view.seconds(job))}</span></div>'
        f'<div class="tr-bar{busy}"><i style="width:{share:.1%}"></i></div>'
        f'<div class="tr-strip-low"><span class="tr-said">{said}</span><span>{count}</span><span>{after}</span></div></div>'
        + warnings(view.warnings)
    )


def ended(view: Progress, job: Job, more: str = "") -> str:
    """The progress strip after the end."""
    took = words.duration(view.seconds(job))
    if job.state == "done":
        said, kind = f"Finished in {took}. {more}", "done"
    elif job.state == "cancelled":
        said, kind = job.text or "Cancelled; what was finished before is kept.", "cancelled"
    else:
        said, kind = job.text, "failed"
    return (
        f'<div class="tr-strip {kind}" role="status"><b>{escape(view.title)}</b><span>{escape(said.strip())}</span></div>'
        + warnings(view.warnings)
    )


def warnings(texts: list[str]) -> str:
    """The core's warnings, the last few."""
    return "".join(notice(text, "warning") for text in dict.fromkeys(texts[-4:]))


def empty_state(title: str, text: str) -> str:
    """A page that has nothing to show yet, and what would fill it."""
    return f'<div class="tr-empty"><b>{escape(title)}</b><p>{escape(text)}</p></div>'


def column_head(role: str, title: str, under: str) -> str:
    """The head of a column. `role`: reference, baseline, chosen."""
    return f'<div class="tr-head {role}"><b>{escape(title)}</b><span>{escape(under)}</span></div>'


def kernel_badge(facts: dict[str, Any]) -> str:
    """Which kernel ran, and on how many layers."""
    if facts.get("simulated"):
        return '<span class="tr-badge simulated">simulated</span>'
    kernels = facts.get("kernels") or {}
    if not kernels:
        return '<span class="tr-badge plain">full precision</span>'
    return "".join(
        f'<span class="tr-badge {_kernel_class(str(name))}">{escape(str(name))} · {words.plural(int(count), "layer")}</span>'
        for name, count in kernels.items()
    )


def sharing_badge(facts: dict[str, Any], *, short: bool = False) -> str:
    """That a recipe shares attention, in how many blocks and what it is foretold to save; empty for one that does not."""
    found = facts.get("sharing")
    if not isinstance(found, dict):
        return ""
    blocks = {block for group in found.get("blocks") or () for block in group}
    said = f"attention sharing in {words.plural(len(blocks), 'block')}"
    if not short and found.get("predicted_saving") is not None:
        said += f" · predicted saving {found['predicted_saving']:.1%} of attention FLOPs"
    return f'<span class="tr-badge sharing">{escape(said)}</span>'


def cards(facts: dict[str, Any], reference: bool = False) -> str:
    """The metric cards of one column; `facts` are a recipe's part of the report."""
    if not facts:
        return '<div class="tr-cards none"></div>'
    if facts.get("kind") == "failed":
        return notice(_why(facts), "warning")
    simulated = bool(facts.get("simulated"))
    step, step_tail = words.spread(facts.get("step_ms"))
    whole, whole_tail = words.spread(facts.get("end_to_end_ms"))
    if simulated:
        why = "not measured: this arithmetic is simulated in floating point, its time says nothing"
        times = _card("Latency", "–", why, "grey") + _card("Step", "–", "simulated", "grey")
    else:
        if whole == "–" and facts.get("denoise_ms"):
            whole, whole_tail = words.milliseconds(facts["denoise_ms"]), "denoising only, n = 1"
        times = _card("Latency", whole, whole_tail) + _card("Step", step, step_tail)
    fp_bytes, weight_bytes = facts.get("fp_weight_bytes"), facts.get("weight_bytes")
    share = words.times(weight_bytes, fp_bytes)
    theory = "theoretical; " if simulated else ""
    memory = f"denoiser {words.size(facts['resident_bytes'])}" if facts.get("resident_bytes") else ""
    bits, sqnr = facts.get("effective_bits"), facts.get("mean_latent_sqnr_db")
    latent = _card("Latent SQNR", f"{sqnr:.1f} dB" if sqnr is not None else "–", "mean over the steps")
    body = (
        times
        + _card("Weights", words.size(weight_bytes), f"{theory}{share} of full precision" if share else "")
        + _card("Peak memory", words.size(facts.get("peak_rss_bytes")), memory)
        + (_as_reference(facts) if reference else _quality(facts) + latent)
        + _card("Effective bits", f"{bits:.2f}" if bits else "–", "" if reference else "a weight, scales included")
    )
    badges = kernel_badge(facts) + sharing_badge(facts)
    return f'<div class="tr-badges">{badges}</div><div class="tr-cards">{body}</div>{_rejected(facts)}{_tool(facts)}'


def _tool(facts: dict[str, Any]) -> str:
    """What another tool does, in its row's words; empty for a recipe."""
    told = facts.get("peer")
    return f'<p class="tr-small tr-note">{escape(str(told.get("description")))}</p>' if isinstance(told, dict) else ""


def noise_floor(facts: dict[str, Any] | None) -> str:
    """Full precision against itself: differences below this are none."""
    if not facts:
        return ""
    found = psnr_text(facts) or "not measured"
    ssim = f", SSIM {facts['ssim']:.4f}" if isinstance(facts.get("ssim"), (int, float)) else ""
    said = "bit for bit the same picture" if found == "identical" else f"PSNR {found}{ssim}"
    step, tail = words.spread(facts.get("step_ms"))
    timed = f" · step {step} ({escape(tail)})" if tail else ""
    return (
        f'<div class="tr-floor"><b>Noise floor</b><span>Full precision run twice: {said}{timed}. '
        "Differences below this are not effects of quantization.</span></div>"
    )


def difference_legend(gain: int) -> str:
    """The scale bar of the difference map."""
    end = 255 / gain
    return (
        f'<div class="tr-scale"><span>darker by {_level(end)}</span><i></i><span>lighter by {_level(end)}</span></div>'
    )


def _level(value: float) -> str:
    return f"{value:.0f} of 255" if value >= 10 else f"{value:.1f} of 255"


def _stage(name: str, now: str) -> str:
    state = "now" if name == PART_OF.get(now, now) else ""
    return f'<span class="{state}">{STAGE_TITLES[name]}</span>'


def _card(name: str, value: str, tail: str = "", kind: str = "") -> str:
    return f'<div class="tr-card {kind}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(tail)}</small></div>'


def _as_reference(facts: dict[str, Any]) -> str:
    said, clips = "this is the reference", ("Temporal error", "Motion ratio") if facts.get("frames") else ()
    return "".join(_card(name, "–", said, "grey") for name in ("PSNR", "SSIM", *clips, "Latent SQNR"))


def _quality(facts: dict[str, Any]) -> str:
    count = facts.get("n")
    several = isinstance(count, int) and count > 1
    spread, ssim_spread = facts.get("psnr_std"), facts.get("ssim_std")
    told = f"against FP, n = {count}" if count else "against FP"
    tail = f"± {spread:.1f}, {told}" if several and spread is not None else told
    ssim = facts.get("ssim")
    ssim_tail = f"± {ssim_spread:.3f}, {told}" if several and ssim_spread is not None else told
    quality = _card("PSNR", psnr_text(facts) or "–", tail) + _card(
        "SSIM", f"{ssim:.3f}" if isinstance(ssim, (int, float)) else "–", ssim_tail
    )
    if "temporal_error_mean" not in facts:
        return quality
    error, ratio = temporal_text(facts["temporal_error_mean"]), ratio_text(facts.get("motion_ratio_mean"))
    return (
        quality
        + _card("Temporal error", error, "flicker that the reference lacks, RMS of 255")
        + _card("Motion ratio", ratio, "1 moves as much as the reference")
    )


def temporal_text(value: Any) -> str:
    """A temporal error in grey levels."""
    return f"{value:.2f} levels" if isinstance(value, (int, float)) else "–"


def ratio_text(value: Any) -> str:
    """A motion ratio."""
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"


def _rejected(facts: dict[str, Any]) -> str:
    rejected = facts.get("rejected") or []
    if not rejected:
        return ""
    names = ", ".join(escape(words.layer(str(entry.get("layer")))) for entry in rejected)
    return (
        f'<details class="tr-small"><summary>Do no harm: {words.plural(len(rejected), "input")} left without the '
        f"transform, which made them worse</summary>{names}</details>"
    )


def _why(facts: dict[str, Any]) -> str:
    return f"Left out: {facts.get('error') or 'it did not run; the log of the run says why.'}"


def _kernel_class(name: str) -> str:
    lowered = name.lower()
    if "multiplied in" in lowered or "unknown" in lowered:  # what another tool did with its int8 weights
        return "plain"
    if "simulat" in lowered:
        return "simulated"
    return "int4" if "int4" in lowered else "int8" if "int8" in lowered else "plain"


def metrics_table(rows: list[tuple[str, dict[str, Any]]], floor: dict[str, Any] | None) -> str:
    """The recipes of a run as lines of numbers, the noise floor last."""
    if not rows:
        return notice("This run ended before it measured anything.", "info")
    clips = any("temporal_error_mean" in facts for _, facts in rows)
    quality = ("PSNR", "SSIM", *(("temporal error", "motion ratio") if clips else ()), "mean latent SQNR")
    names = ("recipe", *quality, "step", "end to end", "weights", "eff. bits", "kernels")
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = [*rows, ("Noise floor", floor)] if floor else rows
    body = "".join(_metrics_row(name, facts or {}, clips) for name, facts in lines)
    return (
        f'<div class="tr-table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _metrics_row(name: str, facts: dict[str, Any], clips: bool) -> str:
    if facts.get("kind") == "failed":
        span = 9 if clips else 7
        return (
            f'<tr class="kept"><td>{escape(name)}</td><td class="why" colspan="{span}">{escape(_why(facts))}</td></tr>'
        )
    ssim, sqnr, bits = facts.get("ssim"), facts.get("mean_latent_sqnr_db"), facts.get("effective_bits")
    version = version_of(facts)
    reference = facts.get("kind") == "reference"
    cells = (
        f"{name} ({version})" if version else name,
        "–" if reference else psnr_text(facts) or "–",
        f"{ssim:.3f}" if isinstance(ssim, (int, float)) and not reference else "–",
        *(_motion_cells(facts) if clips else ()),
        f"{sqnr:.1f} dB" if isinstance(sqnr, (int, float)) and not reference else "–",
        words.spread(facts.get("step_ms"))[0],
        words.spread(facts.get("end_to_end_ms"))[0],
        words.size(facts.get("weight_bytes")),
        f"{bits:.2f}" if bits else "–",
    )
    body = "".join(f'<td class="{"" if index == 0 else "num"}">{escape(cell)}</td>' for index, cell in enumerate(cells))
    badge = kernel_badge(facts) if facts.get("kind") in ("quantized", "shared", "peer") else ""
    return f"<tr>{body}<td>{badge}{sharing_badge(facts, short=True)}</td></tr>"


def _motion_cells(facts: dict[str, Any]) -> tuple[str, str]:
    return temporal_text(facts.get("temporal_error_mean")), ratio_text(facts.get("motion_ratio_mean"))
