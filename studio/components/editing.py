"""The widgets of the plan that is changed layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components import edited
from studio.services.form import ACTIVATION_BITS_CHOICES, BITS_CHOICES
from studio.services.methods import saved_choices

SIDEBAR = "sidebar"


@dataclass(frozen=True)
class PlanPart:
    """The widgets of this half. `edit` is kept on the server."""

    edit: gr.State
    source: gr.Dropdown
    start: gr.Button
    budget: gr.Textbox
    fit: gr.Button
    note: gr.HTML
    totals: gr.HTML
    table: gr.Dataframe
    picked: gr.Dropdown
    weight_bits: gr.Radio
    activation_bits: gr.Radio
    set_bits: gr.Button
    skip: gr.Button
    undo: gr.Button
    name: gr.Textbox
    save: gr.Button
    file: gr.DownloadButton
    use: gr.Button
    saved: gr.HTML
    command: gr.Code

    def drawn(self) -> list[Any]:
        """What a change of the plan draws again."""
        return [self.edit, self.note, self.totals, self.table, self.picked, self.command]


def build() -> PlanPart:
    """The widgets, without a plan."""
    gr.HTML('<h3 class="tr-section">The plan, layer by layer</h3>')
    made: dict[str, Any] = {"edit": gr.State(None)} | _sources()
    made["note"], made["totals"] = gr.HTML(elem_id="edit-note"), gr.HTML(elem_id="edit-totals")
    made["table"] = gr.Dataframe(
        headers=edited.HEADERS, value=[], interactive=False, elem_id="edit-table", wrap=False, max_height=420, buttons=[],
        show_label=False, label="The plan", column_widths=edited.WIDTHS,
    )  # fmt: skip
    made |= _changes() | _keep()
    made["command"] = gr.Code(
        "", language="shell", label="The same from the command line", lines=1, interactive=False, elem_id="edit-command",
        show_line_numbers=False, wrap_lines=True, buttons=["copy"],
    )  # fmt: skip
    return PlanPart(**made)


def _sources() -> dict[str, Any]:
    with gr.Row(elem_classes="tr-choose"):
        source = gr.Dropdown(
            source_choices(()),
            value=SIDEBAR,
            label="Start from",
            elem_id="edit-source",
            interactive=True,
            min_width=230,
        )
        start = gr.Button("Start", elem_id="edit-start", min_width=90, elem_classes="tr-act")
        budget = gr.Textbox(
            "0.16", label="Budget: bytes, 3.2MB, or a share of FP32", elem_id="edit-budget", interactive=True, min_width=230,
            max_lines=1,
        )  # fmt: skip
        fit = gr.Button("Fit to the budget", elem_id="edit-fit", min_width=150, elem_classes="tr-act")
    return {"source": source, "start": start, "budget": budget, "fit": fit}


def _changes() -> dict[str, Any]:
    with gr.Row(elem_classes="tr-choose"):
        picked = gr.Dropdown(
            [], value=[], multiselect=True, label="Layers to change: click on lines of the table, or choose here",
            elem_id="edit-picked", interactive=True, min_width=300, scale=2,
        )  # fmt: skip
        weight_bits = gr.Radio(
            BITS_CHOICES, value=8, label="Weight bits", elem_id="edit-weight-bits", interactive=True, min_width=180,
            elem_classes="tr-segments",
        )  # fmt: skip
        activation_bits = gr.Radio(
            ACTIVATION_BITS_CHOICES, value=8, label="Activation bits", elem_id="edit-activation-bits", interactive=True,
            min_width=180, elem_classes="tr-segments",
        )  # fmt: skip
    with gr.Row(elem_classes="tr-choose"):
        set_bits = gr.Button("Set bits", variant="primary", elem_id="edit-set", min_width=110, elem_classes="tr-act")
        skip = gr.Button("Skip (full precision)", elem_id="edit-skip", min_width=150, elem_classes="tr-act")
        undo = gr.Button("Undo changes", elem_id="edit-undo", min_width=120, elem_classes="tr-act")
    return {
        "picked": picked, "weight_bits": weight_bits, "activation_bits": activation_bits, "set_bits": set_bits,
        "skip": skip, "undo": undo,
    }  # fmt: skip


def _keep() -> dict[str, Any]:
    with gr.Row(elem_classes="tr-choose"):
        name = gr.Textbox(
            "my-plan", label="Recipe name", elem_id="recipe-name", interactive=True, min_width=200, max_lines=1
        )
        save = gr.Button("Save as recipe", elem_id="recipe-save", min_width=130, elem_classes="tr-act")
        file = gr.DownloadButton(
            "Download", interactive=False, elem_id="recipe-file", min_width=110, elem_classes="tr-act"
        )
        use = gr.Button(
            "Choose it on Compare", interactive=False, elem_id="recipe-use", min_width=170, elem_classes="tr-act"
        )
    return {"name": name, "save": save, "file": file, "use": use, "saved": gr.HTML(elem_id="recipe-saved")}


def source_choices(saved: tuple[Any, ...]) -> list[tuple[str, str]]:
    """What a plan can start from."""
    return [("The method of the sidebar", SIDEBAR), *saved_choices(saved)]
