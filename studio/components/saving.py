"""Under a comparison: save a column's model as a folder that diffusers loads, and fetch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components.command import command_box

TITLE = "Save as a diffusers model"
PACK = "Make a zip to download"
INTRO = (
    "Converts the model with this recipe, saves it as a folder that diffusers loads with from_pretrained, loads it again and "
    "samples the run's first prompt with both to see whether the bits agree."
)


@dataclass(frozen=True)
class SaveModel:
    """Its widgets. `made` is the id of the save run that can be downloaded, kept on the server."""

    box: gr.Column
    recipe: gr.Dropdown
    start: gr.Button
    said: gr.HTML
    command: gr.Code
    pack: gr.Button
    download: gr.DownloadButton
    made: gr.State

    def widgets(self) -> list[Any]:
        """Everything that a run, or a choice among its columns, fills."""
        return [self.box, self.recipe, self.start, self.said, self.command, self.pack, self.download, self.made]


def build() -> SaveModel:
    """The widgets, hidden until there is a run with a model to save."""
    made = gr.State(None)
    with gr.Column(visible=False, elem_id="save-model") as box:
        gr.HTML(f'<h3 class="tr-section">{TITLE}</h3><p class="tr-small tr-note">{INTRO}</p>')
        with gr.Row(elem_classes="tr-save"):
            recipe = gr.Dropdown([], label="Recipe of this run", elem_id="save-recipe", interactive=True, min_width=200)
            start = gr.Button("Save the model", elem_id="save-start", size="md", min_width=170, scale=0)
        said = gr.HTML(elem_id="save-said")
        with gr.Row(elem_classes="tr-save"):
            pack = gr.Button(PACK, elem_id="save-pack", visible=False, size="md", min_width=170, scale=0)
            download = gr.DownloadButton(
                "Download the model", elem_id="save-download", visible=False, size="md", min_width=170, scale=0
            )
        command = command_box(elem_id="save-command")
    return SaveModel(box, recipe, start, said, command, pack, download, made)
