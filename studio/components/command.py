"""The line that does in a terminal what the page does."""

from __future__ import annotations

import gradio as gr


def command_box(value: str = "", label: str = "The same from the command line", *, elem_id: str) -> gr.Code:
    """A command to copy; not seen while there is none."""
    return gr.Code(
        value, language="shell", label=label, lines=1, interactive=False, visible=bool(value), elem_id=elem_id,
        show_line_numbers=False, wrap_lines=True, buttons=["copy"],
    )  # fmt: skip


def shown(value: str) -> gr.Code:
    """The update that shows a command, or hides the box where there is none."""
    return gr.Code(value, visible=bool(value))
