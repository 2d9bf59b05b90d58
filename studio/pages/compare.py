"""Compare: run full precision, a baseline and the chosen method, watch them denoise, and look at what changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components import html, methods, plan, result
from studio.components.controls import Controls
from studio.components.events import JOBS, LATEST, QUICK
from studio.context import Studio
from studio.jobs import Job, explain
from studio.pages.shared import CLOSE_SIDEBAR, cancel_own, fail_if_failed, refuse, strip_of, submit
from studio.services import models
from studio.services.form import Form, RunSpec, calibrate_spec, compare_spec, profile_spec
from studio.services.methods import all_facts
from studio.state import LiveRun, Progress

Updates = dict[Any, Any]
READY = "Ready. Choose what to compare, then press Compare. Reloading the page stops what runs; what finished is kept."
SAME_AT_START = "Every column gets the same prompt embeddings, initial latents, sampler and decoder."


@dataclass(frozen=True)
class ComparePage:
    """The page's widgets."""

    strip: gr.HTML
    problem: gr.HTML
    summary: gr.HTML
    table: gr.HTML
    methods: gr.HTML
    result: result.ResultView
    saved: gr.BrowserState


def build_strip() -> tuple[gr.HTML, gr.HTML]:
    """The progress strip and the place for a sentence about bad input, above the tabs."""
    return gr.HTML(html.idle(READY), elem_id="strip"), gr.HTML(elem_id="problem")


def build(strip: gr.HTML, problem: gr.HTML, saved: gr.BrowserState) -> ComparePage:
    """The page, empty."""
    summary = gr.HTML(plan.LOADING, elem_id="plan")
    with gr.Accordion("Plan, layer by layer", open=False, elem_id="plan-layers"):
        table = gr.HTML()
    with gr.Accordion("All methods", open=False, elem_id="all-methods"):
        listed = gr.HTML(methods_table(4, 8))
    return ComparePage(strip, problem, summary, table, listed, result.build(), saved)


def methods_table(weight_bits: Any, activation_bits: Any) -> Any:
    """Every method at the chosen bits; as it was for bits that no method takes."""
    try:
        return methods.table(all_facts(weight_bits, activation_bits), f"W{weight_bits}A{activation_bits}")
    except Exception as error:
        explain(error)
        return gr.skip()


def wire(studio: Studio, controls: Controls, page: ComparePage, header: gr.HTML, header_now: Callable[[], str]) -> None:
    """Connect the page; the header is drawn again once a job has ended."""
    session = _Session(studio, page)
    inputs = controls.inputs()
    planned = {"inputs": inputs, "outputs": [page.summary, page.table, controls.prices, page.problem]}
    # One event for all of them: the page then keeps their order, and the newest plan is the one that stays.
    changes = [widget.change for widget in controls.planned()]
    gr.on([*changes, controls.edges.submit, controls.edges.blur], session.plan, **planned, **LATEST)
    bits = [controls.weight_bits, controls.activation_bits]
    gr.on([widget.change for widget in bits], methods_table, bits, page.methods, **LATEST)
    outputs = [page.strip, page.problem, *page.result.widgets(), page.saved]
    compare = controls.compare.click(session.compare, inputs, outputs, js=CLOSE_SIDEBAR, **JOBS)
    calibrate = controls.calibrate.click(
        session.calibrate, inputs, [page.strip, page.problem], js=CLOSE_SIDEBAR, **JOBS
    )
    controls.cancel.click(session.cancel, None, None, **QUICK)
    for job in (compare, calibrate):
        job.then(header_now, None, header, **QUICK)
        job.success(session.plan, **planned, **LATEST)

    def closer(run_id: str | None, left: str, right: str, prompt: int, gain: int) -> tuple[Any, ...]:
        return result.closer_look(studio.runs.open(run_id), left, right, prompt, gain)

    def player(run_id: str | None, prompt: int) -> str:
        return result.player(page.result, studio.runs.open(run_id), prompt)

    result.wire(page.result, closer, player)


def plan_at_load(studio: Studio, demo: gr.Blocks, controls: Controls, page: ComparePage) -> None:
    """Show the plan as soon as the page is open."""
    outputs = [page.summary, page.table, controls.prices, page.problem]
    handler = _Session(studio, page).plan
    demo.load(handler, controls.inputs(), outputs, **QUICK)


@dataclass(frozen=True)
class _Session:
    """The handlers."""

    studio: Studio
    page: ComparePage

    def plan(self, *values: Any) -> tuple[Any, Any, Any, str]:
        """The plan for the controls as they are; a bad value gives its sentence instead."""
        try:
            view = self.studio.plans.of(Form.of(*values))
        except Exception as error:
            return gr.skip(), gr.skip(), gr.skip(), html.notice(explain(error))
        return plan.totals(view), plan.table(view), plan.prices(view), ""

    def cancel(self, request: gr.Request) -> None:
        """Ask this visitor's job to stop."""
        cancel_own(self.studio, request)

    def calibrate(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """Gather the statistics of full precision and fit the chosen recipe, showing how far it is."""
        page = self.page
        try:
            spec = calibrate_spec(Form.of(*values))
            job = submit(self.studio, spec, "calibration", request)
        except Exception as error:
            yield from refuse(error, page.problem)
            return
        live = LiveRun(Progress(f"Calibrating {spec.recipes[0].name} on {spec.model}"))
        yield {page.problem: "", page.strip: strip_of(self.studio, live.progress, job)}
        for events in self.studio.worker.follow(job):
            live.take(events)
            if not job.finished:
                yield {page.strip: strip_of(self.studio, live.progress, job)}
        yield {page.strip: html.ended(live.progress, job, "The statistics are stored and will be used again.")}
        fail_if_failed(job)

    def compare(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """Run the comparison, streaming previews, and show the stored run at the end."""
        page = self.page
        try:
            spec = self._comparison(Form.of(*values))
            job = submit(self.studio, spec, "comparison", request)
        except Exception as error:
            yield from refuse(error, page.problem)
            return
        live = LiveRun(Progress(f"Comparing {', '.join(recipe.name for recipe in spec.recipes)}"))
        names = result.column_names([recipe.name for recipe in spec.recipes])
        moving = models.check(self.studio.core, spec.model).kind == "video"
        yield {
            page.problem: "",
            page.strip: strip_of(self.studio, live.progress, job),
            **result.cleared(page.result, names, SAME_AT_START, moving=moving),
        }
        for events in self.studio.worker.follow(job):
            changed = live.take(events)
            if not job.finished:
                yield {
                    page.strip: strip_of(self.studio, live.progress, job),
                    **result.live(page.result, live, names, changed, moving=moving),
                }
        yield self._final(live, job, moving)
        fail_if_failed(job)

    def _comparison(self, form: Form) -> RunSpec:
        """A comparison of pictures, or of speed alone where the weights are random."""
        speed_only = models.check(self.studio.core, str(form.model)).kind == "speed"
        return profile_spec(form) if speed_only else compare_spec(form)

    def _final(self, live: LiveRun, job: Job, moving: bool) -> Updates:
        page, stored = self.page, self.studio.runs.open(live.run_id)
        strip = {page.strip: html.ended(live.progress, job, "It is kept under Runs.")}
        if stored is None or not stored.recipes:
            left = result.player(page.result, stored, 0) if moving else ""
            return strip | ({page.result.clips: left} if left else {})
        return strip | result.stored(page.result, stored) | {page.saved: stored.id}
