"""Guidance: where both guidance branches attend alike, which blocks may therefore share, and what sharing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import gradio as gr

from studio.components import html, similarity
from studio.components.command import command_box, shown
from studio.components.controls import Controls
from studio.components.events import JOBS, LATEST, QUICK
from studio.context import Studio
from studio.jobs import explain
from studio.pages import sharing
from studio.pages.shared import CLOSE_SIDEBAR, cancel_own, fail_if_failed, follow, refuse, strip_of, submit
from studio.services import models
from studio.services import sharing as runs
from studio.services.form import Form
from studio.services.parts import SPATIAL, TEMPORAL
from studio.services.similarity import Choice, SimilarityView, check_measure, slider_range
from studio.services.stored import command_line
from studio.state import ATTENTION_STAGES, LiveRun, Progress

Updates = dict[Any, Any]
NO_TEMPORAL = (
    "Spatial attention only: this measurement has no temporal blocks, which attend across the frames; press Measure to "
    "have them as well."
)
TEMPORAL_ONLY_SEEN = "Temporal blocks attend across the frames and are only looked at: a plan shares the spatial ones."
RANDOM = "This model has random weights: its times are real, but how alike its branches attend says nothing."


@dataclass(frozen=True)
class GuidancePage:
    """The page's widgets."""

    strip: gr.HTML
    problem: gr.HTML
    count: gr.Slider
    measure: gr.Button
    cancel: gr.Button
    empty: gr.HTML
    stored: gr.Dropdown
    note: gr.HTML
    similar: similarity.Similar
    use: sharing.SharingPart
    command: gr.Code


def build(strip: gr.HTML, problem: gr.HTML, saved: gr.BrowserState) -> GuidancePage:
    """The page, empty."""
    with gr.Row(elem_classes="tr-choose"):
        count = gr.Slider(
            1, runs.MOST_PROMPTS, runs.DEFAULT_PROMPTS, step=1, label="Prompts to measure on", elem_id="attention-prompts",
            interactive=True, min_width=220, scale=3,
        )  # fmt: skip
        measure = gr.Button("Measure", variant="primary", elem_id="measure-attention", min_width=110)
        cancel = gr.Button("Cancel", elem_id="cancel-attention", min_width=90)
    with gr.Row(elem_classes="tr-choose"):
        stored = gr.Dropdown(
            [], label="Measurement", elem_id="measurement", interactive=True, filterable=False, visible=False,
            min_width=260, scale=3,
        )  # fmt: skip
        part = similarity.build_part()
    empty, note = gr.HTML(elem_id="guidance-empty"), gr.HTML(elem_id="guidance-note")
    similar = similarity.build(part)
    command = command_box(label="The command that repeats this measurement", elem_id="measure-command")
    used = sharing.build(strip, problem, saved)
    return GuidancePage(strip, problem, count, measure, cancel, empty, stored, note, similar, used, command)


def wire(
    studio: Studio, controls: Controls, page: GuidancePage, tab: gr.Tab, header: gr.HTML, header_now: Callable[[], str]
) -> None:
    """Connect the page. Only Measure and Try it sample; everything else is computed from what is stored."""
    handlers = _Handlers(studio, page)
    similar, form = page.similar, controls.inputs()
    chosen = [page.stored, *similar.choice()]
    everything = [page.stored, page.empty, page.note, page.use.box, page.command, *similar.widgets()]
    for trigger in (tab.select, controls.model.change):
        trigger(handlers.show, [controls.model, *chosen], everything, **LATEST)
    for trigger in (page.stored.input, similar.measure.input):
        trigger(handlers.open, chosen, everything, **LATEST)
    similar.part.input(handlers.turn, chosen, everything, **LATEST)
    for trigger, source in (
        (similar.threshold.input, "threshold"), (similar.groups.input, "threshold"),
        (similar.published.click, "published"), (similar.none.click, "none"),
    ):  # fmt: skip
        # Two events: the maps and numbers do not wait for the lines, which a browser draws ten times slower.
        trigger(handlers.plan_from(source), chosen, [page.note, *similar.of_plan()], **LATEST)
        trigger(handlers.lines_from(source), chosen, similar.lines, **LATEST)
    looked = [similar.block, similar.blocks_map, similar.heads_map]
    similar.block.input(handlers.look, chosen, looked, **LATEST)
    similar.blocks_map.select(handlers.look_at, chosen, looked, **LATEST)
    measured = page.measure.click(
        handlers.measure, [page.count, *form], [page.strip, page.problem, *everything], js=CLOSE_SIDEBAR, **JOBS
    )
    page.cancel.click(handlers.cancel, None, None, **QUICK)
    measured.then(header_now, None, header, **QUICK)
    sharing.wire(studio, controls, page.use, chosen, header, header_now)


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    page: GuidancePage

    def show(self, model: Any, run_id: Any, *choice: Any) -> Updates:
        """List what is stored and draw the chosen measurement, or the newest; the threshold stays if it was drawn before."""
        known = self.studio.similarities.choices(str(model))
        ids = [run for _, run in known]
        if not ids:
            return self._nothing(str(model))
        fresh = run_id not in ids
        chosen = ids[0] if fresh else run_id
        return {self.page.stored: gr.Dropdown(choices=known, value=chosen, visible=True)} | self._drawn(
            chosen, Choice() if fresh else Choice(*choice), fresh=fresh
        )

    def open(self, run_id: Any, *choice: Any) -> Updates:
        """Draw a measurement or a measure that was just chosen, with the slider at its start."""
        return self._drawn(run_id, Choice(*choice), fresh=True)

    def turn(self, run_id: Any, *choice: Any) -> Updates:
        """Show the other blocks of the measurement; the threshold stays."""
        return self._drawn(run_id, Choice(*choice), fresh=False)

    def plan_from(self, source: str) -> Callable[..., Updates]:
        """A handler that draws the plan of one source."""

        def plan(run_id: Any, *choice: Any) -> Updates:
            try:
                view, asked, made = self.studio.similarities.asked(run_id, replace(Choice(*choice), source=source))
            except Exception as error:
                return {self.page.note: html.notice(explain(error))}
            return {self.page.note: ""} | similarity.planned(self.page.similar, view, asked, made)

        return plan

    def lines_from(self, source: str) -> Callable[..., Any]:
        """A handler that draws the lines for the plan of one source; the other one shows what is wrong with a value."""

        def lines(run_id: Any, *choice: Any) -> Any:
            try:
                return similarity.lines(
                    *self.studio.similarities.asked(run_id, replace(Choice(*choice), source=source))
                )
            except Exception as error:
                explain(error)
                return gr.skip()

        return lines

    def look(self, run_id: Any, *choice: Any) -> Updates:
        """Show the heads of the chosen block."""
        try:
            return similarity.looked_at(self.page.similar, *self.studio.similarities.asked(run_id, Choice(*choice)))
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from error

    def look_at(self, event: gr.EventData, run_id: Any, *choice: Any) -> Updates:
        """Show the heads of the block of the clicked cell."""
        row = event._data.get("row") if isinstance(event._data, dict) else None
        return self.look(run_id, *astuple(replace(Choice(*choice), block=row)))

    def cancel(self, request: gr.Request) -> None:
        """Ask this visitor's job to stop."""
        cancel_own(self.studio, request)

    def measure(self, request: gr.Request, count: Any, *values: Any) -> Iterator[Updates]:
        """Measure how alike the branches attend, and draw it."""
        page = self.page
        try:
            spec = runs.attention_spec(Form.of(*values), count)
            job = submit(self.studio, spec, "attention", request)
        except Exception as error:
            yield from refuse(error, page.problem)
            return
        live = LiveRun(Progress(f"Measuring the attention of {spec.model}", stages=ATTENTION_STAGES))
        yield {page.problem: ""}
        for _ in follow(self.studio, job, live):
            yield {page.strip: strip_of(self.studio, live.progress, job)}
        ended = {page.strip: html.ended(live.progress, job, "It is stored and can be chosen again.")}
        yield ended | (self.show(spec.model, None) if job.state == "done" else {})
        fail_if_failed(job)

    def _drawn(self, run_id: Any, choice: Choice, *, fresh: bool) -> Updates:
        page = self.page
        try:
            spatial = self.studio.similarities.open(run_id if isinstance(run_id, str) else None)
            if fresh and spatial is not None:
                start = slider_range(spatial, check_measure(choice.measure)).start
                groups = min(int(choice.groups or 1), len(spatial.timesteps))
                choice = replace(choice, source="threshold", threshold=start, groups=groups)
            view, choice, plan = self.studio.similarities.asked(run_id, choice)
        except Exception as error:
            return {page.note: html.notice(explain(error)), page.empty: ""}
        run = self.studio.runs.open(view.id)
        return {
            page.command: shown(command_line(run) if run else ""),
            page.empty: "", page.note: self._note(view), page.use.box: gr.Column(visible=view.part == SPATIAL),
            **similarity.opened(page.similar, view, spatial or view, choice, fresh=fresh),
            **similarity.planned(page.similar, view, choice, plan),
            page.similar.lines: similarity.lines(view, choice, plan),
        }  # fmt: skip

    def _note(self, view: SimilarityView) -> str:
        if models.kind(self.studio.core, view.model) == "speed":
            return html.notice(RANDOM, "warning")
        if view.part == TEMPORAL:
            return html.notice(TEMPORAL_ONLY_SEEN, "info")
        return html.notice(NO_TEMPORAL if view.frame_by_frame and view.temporal is None else "", "info")

    def _nothing(self, model: str) -> Updates:
        page = self.page
        said = (
            "Press Measure: the model samples a few prompts in full precision while both guidance branches are compared, "
            "with the steps, guidance and seed of the sidebar. It is stored and read again from then on."
        )
        return {
            page.stored: gr.Dropdown(choices=[], value=None, visible=False),
            page.empty: html.empty_state(f"No measurement of {model} yet", said),
            page.note: "", page.use.box: gr.Column(visible=False), page.similar.box: gr.Column(visible=False),
            page.similar.part: gr.Radio(visible=False),
            page.command: shown(""),
        }  # fmt: skip
