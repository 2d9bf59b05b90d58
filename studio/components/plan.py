"""The plan as HTML: totals, the price of each storage mode, and one line a layer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from studio.components import words
from studio.components.html import notice
from studio.services.form import STORAGE_LINES
from studio.services.methods import is_simulated
from studio.services.plans import PlanView
from studio.services.statistics import title

LOADING = '<div class="tr-strip idle" role="status">Reading the model to plan the conversion…</div>'


def totals(view: PlanView) -> str:
    """What converting gives, in one row of numbers."""
    plan = view.plan
    quantized = [layer for layer in plan.layers if layer.action == "quantize"]
    kept = len(plan.layers) - len(quantized)
    share = words.times(plan.weight_bytes, plan.fp_bytes)
    cells = (
        ("Recipe", view.recipe.name, f"{words.plural(len(quantized), 'layer')} quantized, {kept} kept"),
        ("In full precision", words.size(plan.fp_bytes), "the quantized layers"),
        ("Packed", words.size(plan.weight_bytes), f"{share}, one set"),
        ("Effective bits", f"{plan.effective_bits:.2f}", "a weight, scales included"),
        ("On the device", words.size(plan.resident_bytes), f"storage: {view.recipe.storage}"),
        ("On disk", words.size(plan.disk_bytes) if plan.disk_bytes else "none", _sets(quantized)),
        ("Arithmetic", *arithmetic(view.recipe, quantized)),
    )
    body = "".join(
        f'<div class="tr-card"><dt>{name}</dt><dd>{escape(value)}</dd><small>{escape(tail)}</small></div>'
        for name, value, tail in cells
    )
    notes = "".join(f'<p class="tr-small tr-note">{escape(_sentence(str(text)))}</p>' for text in plan.notes)
    return f'<div class="tr-cards tr-plan">{body}</div>{calibration_line(view)}{notes}'


def arithmetic(recipe: Any, quantized: Sequence[Any]) -> tuple[str, str]:
    """The kernels of a recipe, or what of it is simulated; one part is enough for its time to say nothing."""
    simulated = sum(1 for layer in quantized if layer.simulated)
    if simulated or is_simulated(recipe):
        parts = [f"{simulated} of {words.plural(len(quantized), 'layer')}"] if simulated else []
        parts += ["attention products"] if recipe.attention is not None else []
        return "simulated", f"{' and '.join(parts)}; speed is not measured"
    return ", ".join(sorted({layer.kernel for layer in quantized})) or "–", "real integer kernels"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def calibration_line(view: PlanView) -> str:
    """Which stored calibration these settings would use again."""
    found = view.calibration
    if found is None:
        return notice(
            "No stored calibration fits these settings yet: Calibrate makes one, and Compare does so by itself.", "info"
        )
    return notice(f"Calibration that will be used again: {title(found)}, took {words.duration(found.seconds)}.", "done")


def prices(view: PlanView) -> str:
    """The storage mode in one sentence, and what each would cost."""
    line = escape(STORAGE_LINES[view.recipe.storage])
    if view.recipe.time.kind == "uniform" and view.recipe.time.count == 1:
        line = "With one group there is one set of weights, so the storage mode makes no difference."
    if not view.prices:
        said = "This method uses one transform for all timesteps, so there is one set of weights."
        return f'<div class="tr-price"><p>{said}</p></div>'
    rows = "".join(
        f'<tr class="{"now" if mode == view.recipe.storage else ""}"><th>{mode}</th>'
        f"<td>{words.size(device)}</td><td>{words.size(disk or None)}</td></tr>"
        for mode, device, disk in view.prices
    )
    return (
        f'<div class="tr-price"><p>{line}</p><table><thead><tr><th></th><td>device</td><td>disk</td></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def table(view: PlanView) -> str:
    """Every linear: what happens to it and why."""
    rows = "".join(_row(layer) for layer in view.plan.layers)
    head = "".join(
        f"<th>{name}</th>"
        for name in ("layer", "role", "shape", "bits", "transforms", "sets", "kernel", "FP", "packed", "share", "why")
    )
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="tr-table" tabindex="0">{body}</div>{_calibrations(view)}'


def _calibrations(view: PlanView) -> str:
    """The stored calibrations of the model, the one that fits marked."""
    if not view.calibrations:
        return ""
    fits = view.calibration.fingerprint if view.calibration else None
    lines = "".join(
        f"<li>{escape(title(info))}{' <b>will be used</b>' if info.fingerprint == fits else ''}</li>"
        for info in view.calibrations
    )
    return f'<p class="tr-small"><b>Stored calibrations of this model</b></p><ul class="tr-small">{lines}</ul>'


def _row(layer: Any) -> str:
    kept = layer.action != "quantize"
    bits = "kept" if kept else f"W{layer.weight_bits} A{layer.activation_bits}"
    kernel = "simulated" if layer.simulated else str(layer.kernel)
    cells = (
        (words.layer(layer.layer), "mono"), (layer.role, ""), (f"{layer.out_features} x {layer.in_features}", "num"), (bits, ""),
        ("" if kept else layer.transforms, ""), ("" if kept else layer.sets, "num"), (kernel, ""),
        (words.size(layer.fp_bytes), "num"), (words.size(layer.weight_bytes), "num"),
        (words.times(layer.weight_bytes, layer.fp_bytes), "num"), (words.layer(layer.reason), "why"),
    )  # fmt: skip
    body = "".join(f'<td class="{kind}">{escape(str(value))}</td>' for value, kind in cells)
    return f'<tr class="{"kept" if kept else ""}">{body}</tr>'


def _sets(quantized: list[Any]) -> str:
    most = max((int(layer.sets) for layer in quantized), default=1)
    return words.plural(most, "set") + " of weights"
