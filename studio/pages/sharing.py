"""The second half of the Guidance page: a plan applied to comparisons, and tried on one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from studio.components import html, trial
from studio.components.controls import Controls, share_box
from studio.components.events import JOBS, LATEST, QUEUED, QUICK
from studio.context import Studio
from studio.jobs import explain
from studio.pages.shared import CLOSE_SIDEBAR, cancel_own, fail_if_failed, follow, refuse, strip_of, submit
from studio.services import models, sharing
from studio.services.form import AppliedPlan, Form
from studio.services.similarity import Choice
from studio.state import LiveRun, Progress

Updates = dict[Any, Any]
CHOICES = 6  # how many of a handler's values belong to the Choice; those of the form follow


@dataclass(frozen=True)
class SharingPart:
    """The widgets of this half."""

    strip: gr.HTML
    problem: gr.HTML
    box: gr.Column
    apply: gr.Button
    file: gr.DownloadButton
    applied: gr.HTML
    command: gr.Code
    trial: trial.TrialView
    saved: gr.BrowserState


def build(strip: gr.HTML, problem: gr.HTML, saved: gr.BrowserState) -> SharingPart:
    """The widgets, hidden until there is a measurement."""
    with gr.Column(visible=False, elem_id="use-plan") as box:
        gr.HTML('<h3 class="tr-section">Use the plan</h3>')
        with gr.Row(elem_classes="tr-pair"):
            apply = gr.Button("Apply", variant="primary", elem_id="apply-plan", min_width=150, size="md")
            file = gr.DownloadButton(
                "Download plan.json", elem_id="plan-file", interactive=False, min_width=150, size="md"
            )
        applied = gr.HTML(elem_id="applied")
        command = gr.Code(
            "", language="shell", label="The same from the command line", lines=1, interactive=False, visible=False,
            elem_id="plan-command", show_line_numbers=False, wrap_lines=True, buttons=["copy"],
        )  # fmt: skip
        gr.HTML('<h3 class="tr-section">Try it on the prompt of the sidebar</h3>')
        view = trial.build()
    return SharingPart(strip, problem, box, apply, file, applied, command, view, saved)


def wire(
    studio: Studio,
    controls: Controls,
    page: SharingPart,
    chosen: list[Any],
    header: gr.HTML,
    header_now: Callable[[], str],
) -> None:
    """Connect the widgets; `chosen` are those that decide the plan."""
    handlers, view, form = Handlers(studio, page, controls), page.trial, controls.inputs()
    outputs = [controls.share, controls.applied, page.applied, page.command, page.file]
    page.apply.click(handlers.apply, [*chosen, *form], outputs, trigger_mode="always_last", **QUEUED)
    view.gain.input(handlers.difference, [view.run_id, view.gain], [view.difference, view.scale], **LATEST)
    tried = view.start.click(
        handlers.tried, [view.base, *chosen, *form], [page.strip, page.problem, view.strip, *view.widgets(), page.saved],
        js=CLOSE_SIDEBAR, **JOBS,
    )  # fmt: skip
    tried.then(header_now, None, header, **QUICK)
    view.cancel.click(handlers.cancel, None, None, **QUICK)


@dataclass(frozen=True)
class Handlers:
    """The handlers."""

    studio: Studio
    page: SharingPart
    controls: Controls

    def apply(self, run_id: Any, *values: Any) -> Updates:
        """Put the plan into the comparisons to come, offer its file, and show the command."""
        page, controls = self.page, self.controls
        try:
            view, plan = self.studio.similarities.to_apply(run_id, Choice(*values[:CHOICES]))
            form = Form.of(*values[CHOICES:])
            if not plan.spec.active:
                return self._without()
            applied = AppliedPlan(view.model, plan.spec)
            command = sharing.compare_command(replace(form, share=True, applied=applied), self.studio.recipes.files())
            again = sharing.measure_command(self.studio.runs.open(view.id), plan.spec)
            path = sharing.plan_file(plan.spec)
        except Exception as error:
            return {page.applied: html.notice(explain(error))}
        said = (
            f"Applied: {sharing.plan_words(plan.spec)}. The next Compare makes each recipe without and with it; "
            "the tick box in the sidebar switches it off."
        )
        if again:
            command = f"# plan.json is the downloaded file; from the command line it comes from:\n{again}\n{command}"
        return {
            controls.share: share_box(applied, True), controls.applied: applied,
            page.applied: html.notice(said, "done"), page.command: gr.Code(command, visible=True),
            page.file: gr.DownloadButton(value=str(path), interactive=True),
        }  # fmt: skip

    def tried(self, request: gr.Request, base: Any, run_id: Any, *values: Any) -> Iterator[Updates]:
        """One prompt with and without the plan, streaming previews."""
        page, view = self.page, self.page.trial
        try:
            measured, plan = self.studio.similarities.to_apply(run_id, Choice(*values[:CHOICES]))
            form = Form.of(*values[CHOICES:])
            self._check_pictures(str(form.model))
            spec = sharing.trial_spec(form, base, plan.spec, measured.model)
            job = submit(self.studio, spec, "trial of sharing", request)
        except Exception as error:
            yield {view.strip: html.notice(explain(error))}
            yield from refuse(error, page.problem)
            return
        pair = (spec.recipes[-2].name, spec.recipes[-1].name)
        live = LiveRun(Progress(f"Trying {pair[1]} on {spec.model}"))
        yield {page.problem: ""} | trial.cleared(view, pair)
        for changed in follow(self.studio, job, live):
            strip = strip_of(self.studio, live.progress, job)
            yield {page.strip: strip, view.strip: strip} | trial.live(view, live, pair, changed)
        strip = html.ended(live.progress, job, "It is kept under Runs.")
        done = self.studio.runs.open(live.run_id) if job.state == "done" else None
        shown = trial.stored(view, done) | {page.saved: live.run_id} if done else {}
        yield {page.strip: strip, view.strip: strip} | shown
        fail_if_failed(job)

    def difference(self, run_id: Any, gain: Any) -> tuple[Any, str]:
        """The difference map at another gain."""
        return trial.difference(self.studio.runs.open(run_id), gain)

    def cancel(self, request: gr.Request) -> None:
        """Ask this visitor's job to stop."""
        cancel_own(self.studio, request)

    def _without(self) -> Updates:
        page, controls = self.page, self.controls
        said = "Comparisons are without attention sharing: the plan shares no block."
        return {
            controls.share: share_box(None), controls.applied: None, page.applied: html.notice(said, "info"),
            page.command: gr.Code(visible=False), page.file: gr.DownloadButton(value=None, interactive=False),
        }  # fmt: skip

    def _check_pictures(self, model: str) -> None:
        if models.check(self.studio.core, model).kind == "speed":
            raise models.ModelError(f"model {model}: its weights are random, so it makes no pictures; choose another.")
