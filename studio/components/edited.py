"""The edited plan on the page: totals and one line a layer."""

from __future__ import annotations

from html import escape
from typing import Any

from studio.components import words
from studio.components.html import notice
from studio.components.plan import arithmetic
from studio.services.edits import EditedLayer, EditedPlan
from studio.services.methods import title_of_method
from studio.services.scans import ScanView

HEADERS = [
    "Layer",
    "W",
    "A",
    "Bytes",
    "Error",
    "Role",
    "Kernel",
    "Changed",
]  # what can be changed stays in sight on a phone
FLOAT = 16  # the activation bits of a layer that only has its weight quantized
WIDTHS = ["190px", "60px", "60px", "90px", "100px", "100px", "220px", "100px"]


def rows(plan: EditedPlan) -> list[list[Any]]:
    """One line a layer, as the table holds them."""
    return [_row(layer) for layer in plan.layers]


def layer_called(plan: EditedPlan, shown: Any) -> str | None:
    """The layer of a line that was clicked, by the name that the table shows."""
    return next((layer.layer for layer in plan.layers if words.layer(layer.layer) == shown), None)


def totals(plan: EditedPlan, scan: ScanView | None) -> str:
    """Bytes, effective bits and predicted error of the plan as it is now."""
    count, changed = len(plan.layers), sum(layer.changed for layer in plan.layers)
    share = f"{words.times(plan.bytes, plan.fp_bytes)} of {words.size(plan.fp_bytes)} in FP32, one set"
    cells = (
        ("Made from", plan.edit.base.name, words.plural(changed, "layer") + " changed"),
        ("Layers", f"{count - plan.skipped} of {count}", f"quantized; {plan.skipped} skipped"),
        ("Bytes", words.size(plan.bytes), share),
        ("Effective bits", f"{plan.effective_bits:.2f}", "a weight, a skipped layer counted as 32"),
        ("On the device", words.size(plan.resident_bytes), f"storage: {plan.recipe.storage}"),
        ("Predicted error", *_error(plan, scan)),
        ("Arithmetic", *arithmetic(plan.recipe, [layer for layer in plan.layers if layer.bits is not None])),
    )  # fmt: skip
    body = "".join(
        f'<div class="tr-card"><dt>{name}</dt><dd>{escape(value)}</dd><small>{escape(tail)}</small></div>'
        for name, value, tail in cells
    )
    notes = "".join(f'<p class="tr-small tr-note">{escape(text[:1].upper() + text[1:])}</p>' for text in plan.notes)
    return f'<div class="tr-cards tr-plan">{body}</div>{_other_method(plan, scan)}{notes}'


def _error(plan: EditedPlan, scan: ScanView | None) -> tuple[str, str]:
    if plan.error is None or scan is None:
        return "–", "scan the layers to foretell it"
    if plan.unmeasured:
        missing = words.plural(plan.unmeasured, "layer")
        return "–", f"the scan lacks the bits of {missing}; it has {', '.join(scan.table.bits)}"
    return f"{plan.error:.2e}", f"sum over the layers, each measured alone with {title_of_method(scan.method)}"


def _other_method(plan: EditedPlan, scan: ScanView | None) -> str:
    if scan is None or plan.edit.method in (None, scan.method):
        return ""
    return notice(
        f"The error is that of a scan with {title_of_method(scan.method)}; this plan is of {title_of_method(plan.edit.method)}, "
        "which has other errors. Scan with the same method for numbers of its own.", "info",
    )  # fmt: skip


def _row(layer: EditedLayer) -> list[Any]:
    error = "–" if layer.error is None else f"{layer.error:.2e}" if layer.error else "0"
    weight, activation, kernel = "skip", "skip", "full precision"
    if layer.bits is not None:
        weight, kernel = str(layer.bits.weight), layer.kernel
        activation = "float" if layer.bits.activation == FLOAT else str(layer.bits.activation)
    changed = "yes" if layer.changed else ""
    return [words.layer(layer.layer), weight, activation, words.size(layer.bytes), error, layer.role, kernel, changed]
