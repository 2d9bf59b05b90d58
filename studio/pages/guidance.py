"""Guidance: where both guidance branches attend alike, which blocks may therefore share, and what sharing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from studio.components import html, similarity, trial
from studio.components.controls import Controls, share_box
from studio.components.similarity import Choice
from studio.context import Studio
from studio.jobs import Job, explain
from studio.pages.shared import CLOSE_SIDEBAR, JOBS, cancel_own, fail_if_failed, refuse, strip_of, submit
from studio.services import models
from studio.services import sharing as runs
from studio.services.form import AppliedPlan, Form
from studio.services.similarity import PlanView, SimilarityView, check_measure, slider_range
from studio.state import ATTENTION_STAGES, LiveRun, Progress

Updates = dict[Any, Any]
CHOICES = 5  # how many of a handler's values belong to the Choice; those of the form follow
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
    use: gr.Column
    apply: gr.Button
    applied: gr.HTML
    command: gr.Code
    file: gr.DownloadButton
    trial: trial.TrialView
    saved: gr.BrowserState


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
            [], label="Measurement", elem_id="measurement", interactive=True, filterable=False, visible=False
        )
    empty, note = gr.HTML(elem_id="guidance-empty"), gr.HTML(elem_id="guidance-note")
    similar = similarity.build()
    with gr.Column(visible=False, elem_id="use-plan") as use:
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
        tried = trial.build()
    return GuidancePage(
        strip, problem, count, measure, cancel, empty, stored, note, similar, use, apply, applied, command, file, tried,
        saved,
    )  # fmt: skip


def wire(
    studio: Studio, controls: Controls, page: GuidancePage, tab: gr.Tab, header: gr.HTML, header_now: Callable[[], str]
) -> None:
    """Connect the page. Only Measure and Try it sample; everything else is computed from what is stored."""
    handlers = _Handlers(studio, page, controls)
    similar, form = page.similar, controls.inputs()
    chosen = [page.stored, *similar.choice()]
    quiet: dict[str, Any] = {
        "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private", "concurrency_limit": 4,
    }  # fmt: skip
    everything = [page.stored, page.empty, page.note, page.use, *similar.widgets()]
    for trigger in (tab.select, controls.model.change):
        trigger(handlers.show, [controls.model, *chosen], everything, **quiet)
    page.stored.input(handlers.open, [controls.model, *chosen], everything, **quiet)
    similar.measure.input(handlers.open, [controls.model, *chosen], everything, **quiet)
    for trigger, source in (
        (similar.threshold.input, "threshold"), (similar.groups.input, "threshold"),
        (similar.published.click, "published"), (similar.none.click, "none"),
    ):  # fmt: skip
        # Two events: the maps and numbers do not wait for the lines, which a browser draws ten times slower.
        trigger(handlers.plan_from(source), chosen, [page.note, *similar.of_plan()], **quiet)
        trigger(handlers.lines_from(source), chosen, similar.lines, **quiet)
    looked = [similar.block, similar.blocks_map, similar.heads_map]
    similar.block.input(handlers.look, chosen, looked, **quiet)
    similar.blocks_map.select(handlers.look_at, chosen, looked, **quiet)
    applied = [controls.share, controls.applied, page.note, page.applied, page.command, page.file]
    page.apply.click(handlers.apply, [*chosen, *form], applied, **quiet)
    page.trial.gain.input(handlers.difference, [page.trial.run_id, page.trial.gain],
                          [page.trial.difference, page.trial.scale], **quiet)  # fmt: skip
    measured = page.measure.click(
        handlers.measure, [page.count, *form], [page.strip, page.problem, *everything], js=CLOSE_SIDEBAR, **JOBS
    )
    tried = page.trial.start.click(
        handlers.tried, [page.trial.base, *chosen, *form],
        [page.strip, page.problem, page.trial.strip, *page.trial.widgets(), page.saved], js=CLOSE_SIDEBAR, **JOBS,
    )  # fmt: skip
    for button in (page.cancel, page.trial.cancel):
        button.click(handlers.cancel, None, None, queue=False, show_progress="hidden", api_visibility="private")
    for job in (measured, tried):
        job.then(header_now, None, header, queue=False, show_progress="hidden", api_visibility="private")


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    page: GuidancePage
    controls: Controls

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

    def open(self, model: Any, run_id: Any, *choice: Any) -> Updates:
        """Draw a measurement or a measure that was just chosen, with the slider at its start."""
        return self._drawn(run_id, Choice(*choice), fresh=True)

    def plan_from(self, source: str) -> Callable[..., Updates]:
        """A handler that draws the plan of one source."""

        def plan(run_id: Any, *choice: Any) -> Updates:
            try:
                view, asked, made = self._plan(run_id, replace(Choice(*choice), source=source))
            except Exception as error:
                return {self.page.note: html.notice(explain(error))}
            return {self.page.note: ""} | similarity.planned(self.page.similar, view, asked, made)

        return plan

    def lines_from(self, source: str) -> Callable[..., Any]:
        """A handler that draws the lines for the plan of one source; the other one shows what is wrong with a value."""

        def lines(run_id: Any, *choice: Any) -> Any:
            try:
                return similarity.lines(*self._plan(run_id, replace(Choice(*choice), source=source)))
            except Exception as error:
                explain(error)
                return gr.skip()

        return lines

    def look(self, run_id: Any, *choice: Any) -> Updates:
        """Show the heads of the chosen block."""
        try:
            return similarity.looked_at(self.page.similar, *self._plan(run_id, Choice(*choice)))
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from error

    def look_at(self, event: gr.EventData, run_id: Any, *choice: Any) -> Updates:
        """Show the heads of the block of the clicked cell."""
        return self.look(run_id, *choice[:-1], event._data.get("row") if isinstance(event._data, dict) else None)

    def difference(self, run_id: Any, gain: Any) -> tuple[Any, str]:
        """The difference map at another gain."""
        return trial.difference(self.studio.runs.open(run_id), gain)

    def cancel(self, request: gr.Request) -> None:
        """Ask this visitor's job to stop."""
        cancel_own(self.studio, request)

    def apply(self, run_id: Any, *values: Any) -> Updates:
        """Put the plan into the comparisons to come, offer its file, and show the command."""
        page, controls = self.page, self.controls
        try:
            view, _, plan = self._plan(run_id, Choice(*values[:CHOICES]))
            form = Form.of(*values[CHOICES:])
            if not plan.spec.active:
                said = "Comparisons are without attention sharing: the plan shares no block."
                return {controls.share: share_box(None), controls.applied: None, page.note: "", page.file: _no_file(),
                        page.applied: html.notice(said, "info"), page.command: gr.Code(visible=False)}  # fmt: skip
            applied = AppliedPlan(view.model, plan.spec)
            command = runs.compare_command(replace(form, share=True, applied=applied))
            again = runs.measure_command(self.studio.runs.open(view.id), plan.spec)
            path = runs.plan_file(plan.spec)
        except Exception as error:
            return {page.note: html.notice(explain(error)), page.applied: html.notice(explain(error))}
        said = (
            f"Applied: {runs.plan_words(plan.spec)}. The next Compare makes each recipe without and with it; "
            "the tick box in the sidebar switches it off."
        )
        comment = "# plan.json is the downloaded file; from the command line it comes from:\n" if again else ""
        return {
            controls.share: share_box(applied, True), controls.applied: applied, page.note: "",
            page.applied: html.notice(said, "done"),
            page.command: gr.Code(f"{comment}{again}\n{command}".strip() if again else command, visible=True),
            page.file: gr.DownloadButton(value=str(path), interactive=True),
        }  # fmt: skip

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
        for _ in self._follow(job, live):
            yield {page.strip: strip_of(self.studio, live.progress, job)}
        ended = {page.strip: html.ended(live.progress, job, "It is stored and can be chosen again.")}
        yield ended | (self.show(spec.model, None) if job.state == "done" else {})
        fail_if_failed(job)

    def tried(self, request: gr.Request, base: Any, run_id: Any, *values: Any) -> Iterator[Updates]:
        """One prompt with and without the plan, streaming previews."""
        page, view = self.page, self.page.trial
        try:
            measured, _, plan = self._plan(run_id, Choice(*values[:CHOICES]))
            form = Form.of(*values[CHOICES:])
            self._check_pictures(str(form.model))
            spec = runs.trial_spec(form, base, plan.spec, measured.model)
            job = submit(self.studio, spec, "trial of sharing", request)
        except Exception as error:
            yield {view.strip: html.notice(explain(error))}
            yield from refuse(error, page.problem)
            return
        pair = (spec.recipes[-2].name, spec.recipes[-1].name)
        live = LiveRun(Progress(f"Trying {pair[1]} on {spec.model}"))
        yield {page.problem: ""} | trial.cleared(view, pair)
        for changed in self._follow(job, live):
            strip = strip_of(self.studio, live.progress, job)
            yield {page.strip: strip, view.strip: strip} | trial.live(view, live, pair, changed)
        strip = html.ended(live.progress, job, "It is kept under Runs.")
        done = self.studio.runs.open(live.run_id) if job.state == "done" else None
        shown = trial.stored(view, done) | {page.saved: live.run_id} if done else {}
        yield {page.strip: strip, view.strip: strip} | shown
        fail_if_failed(job)

    def _follow(self, job: Job, live: LiveRun) -> Iterator[set[str]]:
        """The recipes that changed, each time something happened, until the job is over."""
        yield set()
        for events in self.studio.worker.follow(job):
            changed = live.take(events)
            if not job.finished:
                yield changed

    def _check_pictures(self, model: str) -> None:
        if models.check(self.studio.core, model).kind == "speed":
            raise models.ModelError(f"model {model}: its weights are random, so it makes no pictures; choose another.")

    def _plan(self, run_id: Any, choice: Choice) -> tuple[SimilarityView, Choice, PlanView]:
        similarities = self.studio.similarities
        view = similarities.open(run_id if isinstance(run_id, str) else None)
        if view is None:
            raise models.ModelError("measurement: it is not there any more; choose another, or press Measure.")
        choice = replace(choice, measure=check_measure(choice.measure))
        if choice.source == "published":
            return view, choice, similarities.published(view)
        if choice.source == "none":
            return view, choice, similarities.none(view)
        return view, choice, similarities.by_threshold(view, choice.measure, choice.threshold, choice.groups)

    def _drawn(self, run_id: Any, choice: Choice, *, fresh: bool) -> Updates:
        page = self.page
        try:
            view = self.studio.similarities.open(run_id if isinstance(run_id, str) else None)
            if fresh and view is not None:
                start = slider_range(view, check_measure(choice.measure)).start
                groups = min(int(choice.groups or 1), len(view.timesteps))
                choice = replace(choice, source="threshold", threshold=start, groups=groups)
            view, choice, plan = self._plan(run_id, choice)
        except Exception as error:
            return {page.note: html.notice(explain(error)), page.empty: ""}
        random = models.check(self.studio.core, view.model).kind == "speed"
        return {
            page.empty: "", page.note: html.notice(RANDOM if random else "", "warning"), page.use: gr.Column(visible=True),
            **similarity.opened(page.similar, view, choice, fresh=fresh),
            **similarity.planned(page.similar, view, choice, plan),
            page.similar.lines: similarity.lines(view, choice, plan),
        }  # fmt: skip

    def _nothing(self, model: str) -> Updates:
        page = self.page
        said = (
            "Press Measure: the model samples a few prompts in full precision while both guidance branches are compared, "
            "with the steps, guidance and seed of the sidebar. It is stored and read again from then on."
        )
        return {
            page.stored: gr.Dropdown(choices=[], value=None, visible=False),
            page.empty: html.empty_state(f"No measurement of {model} yet", said),
            page.note: "", page.use: gr.Column(visible=False), page.similar.box: gr.Column(visible=False),
        }  # fmt: skip


def _no_file() -> gr.DownloadButton:
    return gr.DownloadButton(value=None, interactive=False)
