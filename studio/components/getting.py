"""The part of the sidebar that fetches models."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from studio.components.command import command_box
from studio.services import getting


@dataclass(frozen=True)
class GetModel:
    """Its widgets; `typed` is not seen where ids may not be typed."""

    name: gr.Dropdown
    typed: gr.Textbox
    line: gr.HTML
    download: gr.Button
    command: gr.Code


def build(offered: list[tuple[str, str]], allow_hub: bool) -> GetModel:
    """The widgets, for the models that are not on this machine."""
    first = offered[0][1] if offered else None
    with gr.Accordion("Get a model", open=False, elem_id="get-model"):
        name = gr.Dropdown(offered, value=first, label="Not on this machine yet", elem_id="get-name", interactive=True)
        typed = gr.Textbox(
            "", label="Or an id of the hub", placeholder="owner/name", max_lines=1, visible=allow_hub, interactive=True,
            elem_id="get-id",
        )  # fmt: skip
        line = gr.HTML(getting.line(first))
        download = gr.Button("Download", elem_id="get-download", size="sm")
        command = command_box(getting.command(first), elem_id="get-command")
    return GetModel(name, typed, line, download, command)
