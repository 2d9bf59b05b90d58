"""Activations: what a layer's input looks like in a group of timesteps, before and after the method's rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any
from uuid import uuid4

import gradio as gr

from studio import plots
from studio.components import html, words
from studio.components.command import command_box, shown
from studio.components.controls import Controls
from studio.components.events import QUEUED
from studio.context import Studio
from studio.jobs import FINISHED, explain
from studio.pages.shared import session_of
from studio.services import commands
from studio.services.form import Form, chosen_recipe
from studio.services.parts import PART_CHOICES, SPATIAL, parts_of
from studio.services.statistics import LayerView
from studio.services.work import call_work

HISTOGRAM_EMPTY = "Values of the chosen layer's input, before and after the rotation."
TIMELINE_EMPTY = "Largest value of each channel at each timestep."
Updates = dict[Any, Any]


@dataclass(frozen=True)
class ActivationsPage:
    """The page's widgets."""

    empty: gr.HTML
    calibration: gr.Dropdown
    part: gr.Radio
    layer: gr.Dropdown
    group: gr.Dropdown
    log_y: gr.Checkbox
    note: gr.HTML
    histogram: gr.Plot
    facts: gr.HTML
    timeline: gr.Plot
    command: gr.Code


def build() -> ActivationsPage:
    """The page, empty."""
    empty = gr.HTML(elem_id="activations-empty")
    with gr.Row(elem_classes="tr-choose"):
        calibration = gr.Dropdown(
            [], label="Calibration", elem_id="calibration", interactive=True, min_width=260, scale=2
        )
        part = gr.Radio(
            PART_CHOICES, value=SPATIAL, label="Blocks", elem_id="layer-part", interactive=True, visible=False, min_width=190,
            elem_classes="tr-segments",
        )  # fmt: skip
        layer = gr.Dropdown([], label="Layer (its input)", elem_id="layer", interactive=True, min_width=220, scale=3)
        group = gr.Dropdown([], label="Timestep group", elem_id="group", interactive=True, min_width=140)
        log_y = gr.Checkbox(True, label="Logarithmic counts", elem_id="log-y", interactive=True, min_width=140)
    note = gr.HTML(elem_id="activations-note")
    histogram = gr.Plot(plots.empty(HISTOGRAM_EMPTY, 380), show_label=False, elem_id="histogram")
    facts = gr.HTML(elem_id="facts")
    timeline = gr.Plot(plots.empty(TIMELINE_EMPTY, 420), show_label=False, elem_id="timeline")
    command = command_box(elem_id="activations-command")
    return ActivationsPage(empty, calibration, part, layer, group, log_y, note, histogram, facts, timeline, command)


def wire(studio: Studio, controls: Controls, page: ActivationsPage, tab: gr.Tab) -> None:
    """Connect the page: a change of calibration, layer, group or recipe draws again."""
    handlers = _Handlers(studio, page)
    inputs = [page.calibration, page.part, page.layer, page.group, page.log_y, *controls.inputs()]
    outputs = [
        page.empty, page.calibration, page.part, page.layer, page.group, page.note, page.histogram, page.facts,
        page.timeline, page.command,
    ]  # fmt: skip
    shared: dict[str, Any] = QUEUED | {"trigger_mode": "always_last", "concurrency_limit": 8}
    tab.select(handlers.draw, inputs, outputs, **shared)
    for widget in (page.calibration, page.part, page.layer, page.group, page.log_y):
        widget.input(handlers.draw, inputs, outputs, **shared)


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    page: ActivationsPage

    def draw(
        self, request: gr.Request, fingerprint: Any, part: Any, layer: Any, group: Any, log_y: Any, *values: Any
    ) -> Iterator[Updates]:
        """Fill the choices, draw the timeline at once, and the histogram when the model is free."""
        page = self.page
        try:
            form = Form.of(*values)
            recipe = chosen_recipe(form)
            info = self._calibration(fingerprint, form)
            if info is None:
                yield self._nothing(str(form.model))
                return
            layers = parts_of(self.studio.statistics.layers(info))
            part = part if part in layers else next(iter(layers))
            layer = layer if layer in layers[part] else layers[part][0]
            labels = self.studio.statistics.group_labels(info, layer, recipe)
            index = group if isinstance(group, int) and 0 <= group < len(labels) else 0
            chosen = self._layers(layers, part, layer) | self._choices(form, info, labels, index)
            files = self.studio.recipes.files()
            line = commands.activations(str(form.model), recipe, files, info.fingerprint, layer, index)
            yield chosen | self._timeline(info, layer, recipe) | {page.command: shown(line)}
            yield from self._histogram(info, recipe, layer, index, labels[index], bool(log_y), request)
        except Exception as error:
            yield {page.note: html.notice(explain(error))}

    def _calibration(self, fingerprint: Any, form: Form) -> Any:
        known = self.studio.statistics.calibrations(str(form.model))
        chosen = next((info for info in known if info.fingerprint == fingerprint), None)
        return chosen or (known[0] if known else None)

    def _nothing(self, model: str) -> Updates:
        page, usual = self.page, self.studio.statistics.usual_seconds(None)
        took = f", about {words.duration(usual)} on this machine" if usual else ""
        title = f"No calibration yet for {model}"
        return {
            page.empty: html.empty_state(
                title, f"Press Calibrate in the sidebar{took}; the histograms then appear here."
            ),
            page.calibration: gr.Dropdown(choices=[], value=None),
            page.part: gr.Radio(visible=False),
            page.layer: gr.Dropdown(choices=[], value=None),
            page.group: gr.Dropdown(choices=[], value=None),
            page.note: "",
            page.histogram: plots.empty(HISTOGRAM_EMPTY, 380),
            page.facts: "",
            page.timeline: plots.empty(TIMELINE_EMPTY, 420),
            page.command: shown(""),
        }

    def _layers(self, layers: dict[str, list[str]], part: str, layer: str) -> Updates:
        """The layers of one part; the choice of a part where a model has both."""
        page = self.page
        return {
            page.part: gr.Radio(value=part, visible=len(layers) > 1),
            page.layer: gr.Dropdown(choices=[(words.in_part(name), name) for name in layers[part]], value=layer),
        }

    def _choices(self, form: Form, info: Any, labels: list[str], index: int) -> Updates:
        page = self.page
        return {
            page.empty: "",
            page.calibration: gr.Dropdown(
                choices=self.studio.statistics.choices(str(form.model)), value=info.fingerprint
            ),
            page.group: gr.Dropdown(choices=[(label, i) for i, label in enumerate(labels)], value=index),
            page.note: html.notice("Fitting this layer…", "info"),
        }

    def _timeline(self, info: Any, layer: str, recipe: Any) -> Updates:
        view = self.studio.statistics.timeline(info, layer, recipe)
        title = f"Channel absmax of {words.layer(layer)}"
        figure = plots.channel_timeline(view.timeline.timesteps, view.timeline.absmax, view.edges, title=title)
        return {self.page.timeline: figure}

    def _histogram(
        self, info: Any, recipe: Any, layer: str, index: int, label: str, log_y: bool, request: gr.Request
    ) -> Iterator[Updates]:
        page, worker, statistics = self.page, self.studio.worker, self.studio.statistics
        job = worker.submit(
            f"{session_of(request)}:look:{uuid4().hex}", f"a look at {layer}",
            call_work(lambda: statistics.histograms(info, recipe, layer, index, label)),
        )  # fmt: skip
        for _ in worker.follow(job):
            place = worker.place(job)
            if place and job.state not in FINISHED:
                text = (
                    f"The model is busy ({worker.running_label()}); you are number {place} in line for this histogram."
                )
                yield {page.note: html.notice(text, "info")}
        if job.state != "done":
            yield {page.note: html.notice(job.text)}
            return
        view: LayerView = job.result
        found = view.histograms
        title = f"{words.layer(layer)}, timesteps {label}"
        yield {
            page.note: html.notice(str(found.note), "info" if found.kept else "warning"),
            page.histogram: plots.histograms(found.edges, found.before, found.after, log_y=log_y, title=title),
            page.facts: facts_table(view),
        }


def facts_table(view: LayerView) -> str:
    """Before and after in numbers."""
    found = view.histograms
    rows = "".join(
        f"<tr><th>{name}</th><td>{_value(before, kind)}</td><td>{_value(after, kind)}</td></tr>"
        for name, before, after, kind in (
            ("absmax", found.before_facts.absmax, found.after_facts.absmax, "number"),
            ("absmax over RMS", found.before_facts.peak, found.after_facts.peak, "number"),
            ("kurtosis", found.before_facts.kurtosis, found.after_facts.kurtosis, "number"),
            ("clipped share", found.before_facts.clipped_share, found.after_facts.clipped_share, "share"),
            ("SQNR", found.before_facts.sqnr_db, found.after_facts.sqnr_db, "db"),
        )
    )
    return (
        '<div class="tr-facts"><table><thead><tr><th></th><td><i class="before"></i>before</td>'
        f'<td><i class="after"></i>after rotation</td></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="tr-small">{escape(view.recipe.name)}, {words.plural(int(found.rows), "row")} of activations, '
        "the same bins for both, each in units of its RMS. A normal distribution has kurtosis 3. Clipped share: values "
        "outside the single range that rounds the whole tensor best. SQNR: of rounding at the recipe's activation bits.</p></div>"
    )


def _value(value: float | None, kind: str) -> str:
    if value is None or value != value:
        return "–"
    if kind == "share":
        return f"{value:.4%}"
    return f"{value:.1f} dB" if kind == "db" else f"{value:.3g}"
