"""Layers: what each layer's bits cost, and a plan made of it layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components import editing as widgets
from studio.components import html, sensitivity
from studio.components.controls import Controls
from studio.components.events import JOBS, LATEST, QUICK
from studio.context import Studio
from studio.jobs import explain
from studio.pages import editing
from studio.pages.shared import CLOSE_SIDEBAR, cancel_own, fail_if_failed, follow, refuse, strip_of, submit
from studio.services import methods, models, scans
from studio.services.form import Form
from studio.state import SCAN_STAGES, LiveRun, Progress

Updates = dict[Any, Any]
RANDOM = "This model has random weights: bytes are real, but the errors of its layers say nothing."


@dataclass(frozen=True)
class LayersPage:
    """The page's widgets."""

    strip: gr.HTML
    problem: gr.HTML
    method: gr.Dropdown
    bits: gr.CheckboxGroup
    count: gr.Slider
    scan: gr.Button
    cancel: gr.Button
    stored: gr.Dropdown
    empty: gr.HTML
    note: gr.HTML
    result: sensitivity.ScanResult
    plan: widgets.PlanPart


def build(strip: gr.HTML, problem: gr.HTML) -> LayersPage:
    """The page, empty."""
    gr.HTML('<h3 class="tr-section">Sensitivity: each layer quantized alone</h3>')
    with gr.Row(elem_classes="tr-choose"):
        method = gr.Dropdown(
            methods.baseline_choices(), value=scans.DEFAULT_METHOD, label="Method of the scan", elem_id="scan-method",
            interactive=True, min_width=180,
        )  # fmt: skip
        bits = gr.CheckboxGroup(
            scans.BITS_CHOICES, value=scans.DEFAULT_BITS, label="Bits to try", elem_id="scan-bits", interactive=True,
            min_width=280, scale=2,
        )  # fmt: skip
        count = gr.Slider(
            1, scans.MOST_PROMPTS, scans.DEFAULT_PROMPTS, step=1, label="Prompts to measure on", elem_id="scan-prompts",
            interactive=True, min_width=240,
        )  # fmt: skip
    with gr.Row(elem_classes="tr-choose"):
        scan = gr.Button("Scan", variant="primary", elem_id="run-scan", min_width=110, elem_classes="tr-act")
        cancel = gr.Button("Cancel", elem_id="cancel-scan", min_width=90, elem_classes="tr-act")
    with gr.Row(elem_classes="tr-choose"):
        stored = gr.Dropdown(
            [], label="Stored scan", elem_id="stored-scan", interactive=True, filterable=False, visible=False
        )
    empty, note = gr.HTML(elem_id="scan-empty"), gr.HTML(elem_id="scan-note")
    found = sensitivity.build()
    return LayersPage(strip, problem, method, bits, count, scan, cancel, stored, empty, note, found, widgets.build())


def wire(
    studio: Studio,
    controls: Controls,
    page: LayersPage,
    tabs: gr.Tabs,
    tab: gr.Tab,
    header: gr.HTML,
    header_now: Callable[[], str],
) -> None:
    """Connect the page. Only Scan runs the model; everything else is computed from what is stored."""
    handlers, found = _Handlers(studio, page), page.result
    everything = [page.stored, page.empty, page.note, *found.widgets()]
    chosen = [page.stored, *found.choice()]
    editing.wire(studio, controls, page.plan, page.stored, tabs)
    for trigger in (tab.select, controls.model.change):
        shown = trigger(handlers.show, [controls.model, *chosen], everything, **LATEST)
        editing.follow_scan(studio, controls, page.plan, page.stored, shown)
    opened = page.stored.input(handlers.open, chosen, everything, **LATEST)
    editing.follow_scan(studio, controls, page.plan, page.stored, opened)
    for widget in (found.bits, found.error, found.order, found.log_y):
        widget.input(handlers.draw, chosen, [found.chart, page.note], **LATEST)
    scanned = page.scan.click(
        handlers.scan, [page.method, page.bits, page.count, *controls.inputs()],
        [page.strip, page.problem, *everything], js=CLOSE_SIDEBAR, **JOBS,
    )  # fmt: skip
    page.cancel.click(handlers.cancel, None, None, **QUICK)
    scanned.then(header_now, None, header, **QUICK)
    editing.follow_scan(studio, controls, page.plan, page.stored, scanned)


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    page: LayersPage

    def show(self, model: Any, run_id: Any, *choice: Any) -> Updates:
        """List what is stored and draw the chosen scan, or the newest."""
        known = self.studio.scans.choices(str(model))
        ids = [run for _, run in known]
        if not ids:
            return self._nothing(str(model))
        chosen = run_id if run_id in ids else ids[0]
        return {self.page.stored: gr.Dropdown(choices=known, value=chosen, visible=True)} | self.open(chosen, *choice)

    def open(self, run_id: Any, *choice: Any) -> Updates:
        """Draw a scan."""
        page = self.page
        try:
            view = self.studio.scans.open(run_id)
            drawn = sensitivity.opened(page.result, view, *choice, scans.scan_command(view))
            random = models.check(self.studio.core, view.model).kind == "speed"
        except Exception as error:
            return {page.note: html.notice(explain(error)), page.empty: ""}
        return drawn | {page.empty: "", page.note: html.notice(RANDOM if random else "", "warning")}

    def draw(self, run_id: Any, *choice: Any) -> Updates:
        """Draw the chart for another choice."""
        page = self.page
        try:
            return {page.result.chart: sensitivity.chart(self.studio.scans.open(run_id), *choice), page.note: ""}
        except Exception as error:
            return {page.note: html.notice(explain(error))}

    def cancel(self, request: gr.Request) -> None:
        """Ask this visitor's job to stop."""
        cancel_own(self.studio, request)

    def scan(self, request: gr.Request, method: Any, bits: Any, count: Any, *values: Any) -> Iterator[Updates]:
        """Quantize each layer alone and draw what that did; what a stopped scan finished is drawn too."""
        page = self.page
        try:
            spec = scans.scan_spec(Form.of(*values), method, bits, count)
            job = submit(self.studio, spec, "sensitivity scan", request)
        except Exception as error:
            yield from refuse(error, page.problem)
            return
        live = LiveRun(Progress(f"Scanning the layers of {spec.model}", stages=SCAN_STAGES))
        yield {page.problem: ""}
        for _ in follow(self.studio, job, live):
            yield {page.strip: strip_of(self.studio, live.progress, job)}
        ended = {page.strip: html.ended(live.progress, job, "It is stored and can be chosen again.")}
        yield ended | self.show(spec.model, live.run_id, spec.bits[-1], "denoiser_error", "model", False)
        fail_if_failed(job)

    def _nothing(self, model: str) -> Updates:
        page = self.page
        said = (
            "Press Scan: each layer is quantized alone at each bit-width, and the change of the prediction is measured, "
            "with the steps, guidance, seed and, where the method has them, time groups of the sidebar. It is stored and read "
            "again from then on."
        )
        return {
            page.stored: gr.Dropdown(choices=[], value=None, visible=False),
            page.empty: html.empty_state(f"No scan of {model} yet", said),
            page.note: "", page.result.box: gr.Column(visible=False),
        }  # fmt: skip
