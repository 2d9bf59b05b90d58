"""A measurement of the guidance branches on the page: heatmaps, the threshold, the plan it makes, lines and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from studio import plots
from studio.components import heatmap, sharing
from studio.components.heatmap import Heatmap
from studio.services.parts import PART_CHOICES, SPATIAL
from studio.services.similarity import (
    MEASURE_CHOICES,
    MEASURE_WORDS,
    MOST_GROUPS,
    Choice,
    PlanView,
    SharingMeasure,
    SimilarityView,
    slider_range,
)

LINES_EMPTY = "A line for each block over the timesteps appears here once a measurement is chosen."
Updates = dict[Any, Any]


@dataclass(frozen=True)
class Similar:
    """The widgets. `source` says what made the plan: the threshold, the published list, or nothing; kept on the server."""

    source: gr.State
    box: gr.Column
    part: gr.Radio
    about: gr.HTML
    measure: gr.Radio
    bar: gr.HTML
    blocks_map: gr.HTML
    planning: gr.Column
    threshold: gr.Slider
    groups: gr.Slider
    published: gr.Button
    none: gr.Button
    summary: gr.HTML
    block: gr.Dropdown
    heads_map: gr.HTML
    lines: gr.Plot
    group_table: gr.HTML
    step_table: gr.HTML

    def choice(self) -> list[Any]:
        """The widgets that decide what is drawn, in the order of `Choice`."""
        return [self.measure, self.threshold, self.groups, self.source, self.block, self.part]

    def of_plan(self) -> list[Any]:
        """The widgets that a change of the plan draws again, without the lines, which take longest."""
        return [self.source, self.blocks_map, self.summary, self.heads_map, self.group_table]

    def widgets(self) -> list[Any]:
        """Everything that a measurement fills."""
        fixed = [self.box, self.part, self.about, self.measure, self.bar, self.planning, self.threshold, self.groups]
        return [*fixed, self.block, self.step_table, *self.of_plan(), self.lines]


def build_part() -> gr.Radio:
    """Which blocks of a video model are shown; hidden for others."""
    return gr.Radio(
        PART_CHOICES, value=SPATIAL, label="Blocks", elem_id="guidance-part", interactive=True, visible=False, min_width=190,
        elem_classes="tr-segments",
    )  # fmt: skip


def build(part: gr.Radio) -> Similar:
    """The widgets, hidden until there is a measurement."""
    source = gr.State("threshold")
    with gr.Column(visible=False, elem_id="similarity") as box:
        about = gr.HTML(elem_id="similarity-about")
        with gr.Row(equal_height=False, elem_classes="tr-closer"):
            with gr.Column(scale=3, min_width=320):
                blocks_map = _map("blocks-map")
                bar = gr.HTML(elem_id="colour-range")
            with gr.Column(scale=2, min_width=290):
                measure = gr.Radio(
                    MEASURE_CHOICES, value="output_error", label="Measure", elem_id="measure", interactive=True,
                    elem_classes="tr-segments",
                )  # fmt: skip
                with gr.Column(elem_id="planning") as planning:
                    threshold = gr.Slider(
                        0, 1, 0, step=0.01, label="Threshold", elem_id="threshold", interactive=True,
                        info="A block shares in a time group if it keeps to this at every step of the group.",
                    )  # fmt: skip
                    groups = gr.Slider(
                        1, MOST_GROUPS, 1, step=1, label="Time groups of the plan", elem_id="plan-groups",
                        interactive=True,
                    )  # fmt: skip
                    with gr.Row(elem_classes="tr-pair"):
                        published = gr.Button("Published list", size="sm", elem_id="published", min_width=110)
                        none = gr.Button("None", size="sm", elem_id="no-sharing", min_width=80)
                    summary = gr.HTML(elem_id="sharing-plan")
        gr.HTML('<h3 class="tr-section">Heads of one block</h3>')
        block = gr.Dropdown(
            [], label="Block (or choose one in the map above)", elem_id="block", interactive=True, filterable=False
        )
        heads_map = _map("heads-map", clickable=False)
        gr.HTML('<h3 class="tr-section">Over time</h3><p class="tr-small">A click on a name hides its line.</p>')
        lines = gr.Plot(plots.empty(LINES_EMPTY, 430), show_label=False, elem_id="temporal")
        with gr.Accordion("The same in numbers", open=False, elem_id="similarity-numbers"):
            group_table, step_table = gr.HTML(elem_id="group-table"), gr.HTML(elem_id="step-table")
    return Similar(
        source, box, part, about, measure, bar, blocks_map, planning, threshold, groups, published, none, summary, block,
        heads_map, lines, group_table, step_table,
    )  # fmt: skip


def _map(name: str, clickable: bool = True) -> gr.HTML:
    classes = "" if clickable else "tr-map-still"
    return gr.HTML(elem_id=name, elem_classes=classes, js_on_load=heatmap.ON_LOAD)


def opened(page: Similar, view: SimilarityView, spatial: SimilarityView, choice: Choice, *, fresh: bool) -> Updates:
    """What a measurement, its blocks to show and a measure fix; a `fresh` one sets the slider to its start as well.

    The slider is that of the spatial blocks, which plans are made of, also while it is hidden.
    """
    measure: SharingMeasure = choice.measure
    span = slider_range(spatial, measure)
    relation = "at most" if measure == "output_error" else "at least"
    label = f"Threshold: {MEASURE_WORDS[measure]} {relation}"
    kept = {} if fresh else {"value": choice.threshold}
    groups = min(int(choice.groups or 1), len(view.timesteps))
    return {
        page.box: gr.Column(visible=True),
        page.part: gr.Radio(value=view.part, visible=spatial.temporal is not None),
        page.planning: gr.Column(visible=view.part == SPATIAL),
        page.about: sharing.about_line(view),
        page.measure: measure,
        page.bar: heatmap.colour_bar(
            MEASURE_WORDS[measure], view.widest(measure), cosine=measure == "map_cosine", shared=view.part == SPATIAL
        ),
        page.threshold: gr.Slider(
            **({"value": span.start} | kept), minimum=span.least, maximum=span.most, step=span.step, label=label
        ),
        page.groups: gr.Slider(value=groups, maximum=min(MOST_GROUPS, len(view.timesteps))),
        page.block: gr.Dropdown(
            choices=[(f"block {block}", block) for block in range(view.count)], value=block_of(view, choice.block)
        ),
        page.step_table: sharing.step_table(view, measure),
    }


def planned(page: Similar, view: SimilarityView, choice: Choice, plan: PlanView) -> Updates:
    """The plan drawn on the maps, in cards, in words and in a table; of temporal blocks the maps alone."""
    measure: SharingMeasure = choice.measure
    shares = view.part == SPATIAL
    return {
        page.source: choice.source,
        page.blocks_map: _blocks(view, measure, plan, block_of(view, choice.block)),
        page.heads_map: _heads(view, measure, plan, block_of(view, choice.block)),
        page.summary: sharing.plan_summary(view, plan) if shares else "",
        page.group_table: sharing.group_table(view, plan, measure) if shares else "",
    }


def looked_at(page: Similar, view: SimilarityView, choice: Choice, plan: PlanView) -> Updates:
    """The maps with another block chosen."""
    block, measure = block_of(view, choice.block), choice.measure
    return {
        page.block: block,
        page.blocks_map: _blocks(view, measure, plan, block),
        page.heads_map: _heads(view, measure, plan, block),
    }


def lines(view: SimilarityView, choice: Choice, plan: PlanView) -> Any:
    """A line a block over the timesteps; the threshold as a line where it made the plan."""
    measure: SharingMeasure = choice.measure
    words = MEASURE_WORDS[measure]
    title = f"{words[:1].upper()}{words[1:]} of each block"
    return plots.block_lines(
        view.timesteps, view.blocks[measure], title=title, measure=words, threshold=plan.spec.threshold,
        edges=plan.spec.edges,
    )  # fmt: skip


def block_of(view: SimilarityView, block: Any) -> int:
    """The chosen block; the one least alike if the page named none that there is."""
    if isinstance(block, int) and not isinstance(block, bool) and 0 <= block < view.count:
        return block
    return int(np.argmax(view.blocks["output_error"].max(0)))


def _blocks(view: SimilarityView, measure: SharingMeasure, plan: PlanView, block: int) -> str:
    values = view.blocks[measure]
    words = MEASURE_WORDS[measure]
    return heatmap.heatmap(
        Heatmap(
            title=f"{words[:1].upper()}{words[1:]} of the unconditional branch with the conditional map"
            if measure == "output_error" else "Cosine of both branches' attention maps, mean over the heads",
            row="block", measure=words, values=values, gap=view.gap(measure, values), widest=view.widest(measure),
            timesteps=view.timesteps, shared=plan.shared, edges=plan.spec.edges, chosen=block,
        )
    )  # fmt: skip


def _heads(view: SimilarityView, measure: SharingMeasure, plan: PlanView, block: int) -> str:
    values = view.heads[measure][:, block]
    shared = np.repeat(plan.shared[:, block, None], values.shape[1], axis=1)
    return heatmap.heatmap(
        Heatmap(
            title=f"Heads of block {block}: {MEASURE_WORDS[measure]}, the same colours as above", row="head",
            measure=MEASURE_WORDS[measure], values=values, gap=view.gap(measure, values), widest=view.widest(measure),
            timesteps=view.timesteps, shared=shared, edges=plan.spec.edges,
        )
    )  # fmt: skip
