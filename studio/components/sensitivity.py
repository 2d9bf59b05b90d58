"""A sensitivity scan on the page: the bar chart and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from studio import plots
from studio.components import words
from studio.components.html import notice
from studio.services.methods import title_of_method
from studio.services.scans import ERROR_CHOICES, ERROR_WORDS, ORDER_CHOICES, Cell, ScanView, check_error

CHART_EMPTY = "A bar for each layer appears here once a scan is chosen."
Updates = dict[Any, Any]


@dataclass(frozen=True)
class ScanResult:
    """The widgets of an opened scan."""

    box: gr.Column
    about: gr.HTML
    bits: gr.Radio
    error: gr.Radio
    order: gr.Radio
    log_y: gr.Checkbox
    chart: gr.Plot
    numbers: gr.HTML
    command: gr.Code

    def choice(self) -> list[Any]:
        """The widgets that decide what is drawn."""
        return [self.bits, self.error, self.order, self.log_y]

    def widgets(self) -> list[Any]:
        """Everything that a scan fills."""
        return [self.box, self.about, self.bits, self.chart, self.numbers, self.command]


def build() -> ScanResult:
    """The widgets, hidden until there is a scan."""
    with gr.Column(visible=False, elem_id="scan") as box:
        about = gr.HTML(elem_id="scan-about")
        with gr.Row(elem_classes="tr-choose"):
            bits = gr.Radio(
                [], label="Bits", elem_id="scan-shown", interactive=True, min_width=260, elem_classes="tr-segments"
            )
            error = gr.Radio(
                ERROR_CHOICES, value="denoiser_error", label="Error", elem_id="scan-error", interactive=True, min_width=230,
                elem_classes="tr-segments",
            )  # fmt: skip
            order = gr.Radio(
                ORDER_CHOICES, value="model", label="Order", elem_id="scan-order", interactive=True, min_width=230,
                elem_classes="tr-segments",
            )  # fmt: skip
        log_y = gr.Checkbox(False, label="Logarithmic", elem_id="scan-log", interactive=True, container=False)
        chart = gr.Plot(plots.empty(CHART_EMPTY), show_label=False, elem_id="scan-chart")
        with gr.Accordion("Numbers of every layer", open=False, elem_id="scan-numbers"):
            numbers = gr.HTML()
        command = gr.Code(
            "", language="shell", label="The command that repeats this scan", lines=1, interactive=False,
            elem_id="scan-command", show_line_numbers=False, wrap_lines=True, buttons=["copy"],
        )  # fmt: skip
    return ScanResult(box, about, bits, error, order, log_y, chart, numbers, command)


def opened(page: ScanResult, view: ScanView, bits: Any, error: Any, order: Any, log_y: Any, command: str) -> Updates:
    """The updates that show a scan; the bit-width stays where the scan has it."""
    # The fewest bits first: that is where layers differ most.
    label = bits if bits in view.table.bits else view.table.bits[-1]
    return {
        page.box: gr.Column(visible=True),
        page.about: about(view),
        page.bits: gr.Radio(choices=list(view.table.bits), value=label),
        page.chart: chart(view, label, error, order, log_y),
        page.numbers: numbers(view),
        page.command: command,
    }


def about(view: ScanView) -> str:
    """What the numbers of a scan are."""
    facts = view.table.about
    steps = len(facts.get("timesteps") or ())
    said = (
        f"Each of {words.plural(len(view.table.layers), 'layer')} of {view.model} was quantized alone with "
        f"{title_of_method(view.method)}, everything else in full precision, and compared at {words.plural(steps, 'step')} "
        f"of sampling {words.plural(len(facts.get('prompts') or ()), 'prompt')}. It took {words.duration(facts.get('seconds'))}."
    )
    partial = "" if facts.get("complete", True) else notice("This scan was stopped; bit-widths are missing.", "warning")
    return f'<p class="tr-same">{escape(said)}</p>{partial}'


def chart(view: ScanView, bits: Any, error: Any, order: Any, log_y: Any) -> Any:
    """The bar chart."""
    bars = [(words.layer(bar.layer), bar.role, bar.error) for bar in view.bars(bits, error, order)]
    title = f"{view.check_bits(bits)}: {ERROR_WORDS[check_error(error)]}"
    return plots.layer_bars(bars, title=title, log_y=bool(log_y))


def numbers(view: ScanView) -> str:
    """Both errors and the bytes at every bit-width: of each role, its layers added up, then of every layer."""
    roles = [((escape(role.role), str(role.layers)), role.cells) for role in view.table.roles().values()]
    layers = []
    for x in view.table.layers:
        name = f'<span class="mono">{escape(words.layer(x.layer))}</span>'
        layers.append(((name, f"{escape(x.role)}, {x.out_features} x {x.in_features}"), x.cells))
    bits = view.table.bits
    return _table(("role, errors added up", "layers"), roles, bits) + _table(("layer", "role and shape"), layers, bits)


def _table(first: Sequence[str], rows: Sequence[tuple[Sequence[str], Mapping[str, Cell]]], bits: Sequence[str]) -> str:
    """A table whose first cells are HTML and whose others are the numbers at each bit-width."""
    names = [*first, *(f"{label} {what}" for label in bits for what in ("prediction", "layer", "bytes"))]
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>"
    body = "".join(
        "<tr>"
        + "".join(f"<td>{word}</td>" for word in said)
        + "".join(_cells(cells[label]) for label in bits)
        + "</tr>"
        for said, cells in rows
    )
    return f'<div class="tr-table" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _cells(cell: Cell) -> str:
    return (
        f'<td class="num">{cell.denoiser_error:.2e}</td><td class="num">{cell.layer_error:.2e}</td>'
        f'<td class="num">{words.size(cell.bytes)}</td>'
    )
