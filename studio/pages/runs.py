"""Runs: what was done before. Nothing that finished is lost by closing the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio.components import clips, html, result
from studio.components.controls import Controls, offer, share_box
from studio.components.events import QUEUED, QUICK
from studio.context import Studio
from studio.services import pictures
from studio.services.export import export_words, saved_folder
from studio.services.form import form_of_spec
from studio.services.stored import RunRow, StoredRun, command_line

HEADERS = ["Created", "Command", "Model", "Recipes", "State", "Run"]
Updates = dict[Any, Any]


@dataclass(frozen=True)
class RunsPage:
    """The page's widgets."""

    empty: gr.HTML
    table: gr.Dataframe
    refresh: gr.Button
    chosen: gr.State
    box: gr.Column
    head: gr.HTML
    gallery: gr.Gallery
    strips: gr.HTML
    metrics: gr.HTML
    command: gr.Code
    show: gr.Button
    settings: gr.Button
    download: gr.DownloadButton


def build() -> RunsPage:
    """The page, empty."""
    empty = gr.HTML(elem_id="runs-empty")
    table = gr.Dataframe(
        headers=HEADERS, value=[], interactive=False, elem_id="runs-table", show_search="filter", wrap=False,
        max_height=320, buttons=[], show_label=False, label="Runs",
        column_widths=["170px", "100px", "130px", "300px", "100px", "270px"],
    )  # fmt: skip
    refresh = gr.Button("Refresh the list", size="sm", elem_id="refresh-runs")
    chosen = gr.State(None)
    with gr.Column(visible=False, elem_id="opened-run") as box:
        head = gr.HTML(elem_id="run-head")
        gallery = gr.Gallery(
            label="Pictures", format="png", columns=4, height=None, object_fit="contain", elem_id="run-pictures",
            buttons=["download", "fullscreen"], interactive=False, show_label=False,
        )  # fmt: skip
        strips, metrics = gr.HTML(elem_id="run-strips"), gr.HTML(elem_id="run-metrics")
        with gr.Row():
            show = gr.Button("Show in Compare", variant="primary", elem_id="show-run", min_width=150)
            settings = gr.Button("Load its settings", elem_id="load-settings", min_width=150)
            download = gr.DownloadButton("Download everything", elem_id="download-run", min_width=150)
        command = gr.Code(
            "", language="shell", label="The command that repeats this run", lines=1, interactive=False,
            show_line_numbers=False, wrap_lines=True, buttons=["copy"],
        )  # fmt: skip
    return RunsPage(
        empty, table, refresh, chosen, box, head, gallery, strips, metrics, command, show, settings, download
    )


def wire(
    studio: Studio, controls: Controls, page: RunsPage, view: result.ResultView, tabs: gr.Tabs, tab: gr.Tab
) -> None:
    """Connect the page; showing a run fills the Compare page's `view`."""
    handlers = _Handlers(studio, page, view, controls, tabs)
    for trigger in (tab.select, page.refresh.click):
        trigger(handlers.rows, None, [page.empty, page.table], **QUICK)
    opened = [page.chosen, page.box, page.head, page.gallery, page.strips, page.metrics, page.command, page.download]
    page.table.select(handlers.open, None, opened, **QUICK)
    page.show.click(handlers.show, page.chosen, [*view.widgets(), tabs], **QUEUED)
    page.settings.click(handlers.settings, page.chosen, [*controls.inputs(), tabs], **QUEUED)


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    page: RunsPage
    view: result.ResultView
    controls: Controls
    tabs: gr.Tabs

    def rows(self) -> tuple[str, list[list[str]]]:
        """The table, or what would fill it."""
        return table_of(self.studio)

    def open(self, event: gr.SelectData) -> Updates:
        """Show the run on the clicked line."""
        page = self.page
        run = self.studio.runs.open(str(event.row_value[-1])) if event.row_value else None
        if run is None:
            raise gr.Error("This run is not there any more; refresh the list.", print_exception=False)
        moving = clips.is_moving(run)
        return {
            page.chosen: run.id,
            page.box: gr.Column(visible=True),
            page.head: head_of(run),
            page.gallery: gr.Gallery([] if moving else gallery_of(run), visible=not moving),
            page.strips: clips.run_strips(run, clips.published(page.strips)) if moving else "",
            page.metrics: metrics_table(run) + saved_words(run, local=self.studio.settings.local),
            page.command: command_line(run),
            page.download: result.download_of(run),
        }

    def show(self, run_id: str | None) -> Updates:
        """Fill the Compare page with the opened run and go there."""
        run = self.studio.runs.open(run_id)
        if run is None or not run.recipes:
            raise gr.Error("This run has no finished pictures to show.", print_exception=False)
        return result.stored(self.view, run) | {self.tabs: gr.Tabs(selected="compare")}

    def settings(self, run_id: str | None) -> Updates:
        """Set the controls as they were for the opened run."""
        run = self.studio.runs.open(run_id)
        if run is None or run.spec is None:
            raise gr.Error("This run has no settings that can be read.", print_exception=False)
        gr.Success(f"The settings of {run.id} are in the sidebar.")
        saved = self.studio.recipes.all()
        values = form_of_spec(run.spec, saved)
        values["share"] = share_box(values["applied"], bool(values["share"]))
        chosen = {name: values.pop(name, None) for name in ("method", "baseline")}
        updates = {getattr(self.controls, name): value for name, value in values.items()}
        return updates | offer(self.controls, saved, **chosen) | {self.tabs: gr.Tabs(selected="compare")}


def table_of(studio: Studio) -> tuple[str, list[list[str]]]:
    """The empty state and the rows of the table."""
    rows: list[RunRow] = studio.runs.rows()
    if rows:
        return "", [list(row) for row in rows]
    text = "Press Compare in the sidebar; every run, also from the command line, is then listed here with its pictures."
    return html.empty_state("No runs yet", text), []


def head_of(run: StoredRun) -> str:
    """The opened run in one line."""
    return html.notice(f"Run {run.id}: {run.state}.", "done" if run.state == "done" else "warning")


def gallery_of(run: StoredRun) -> list[tuple[Any, str]]:
    """Every picture of the run, prompt by prompt."""
    found = []
    for index, prompt in enumerate(run.prompts):
        for name, facts in run.recipes.items():
            picture = run.picture(name, index)
            if picture is not None:
                found.append((pictures.enlarge(picture), f"{result.title_of(name, facts)}: {prompt}"))
    return found


def metrics_table(run: StoredRun) -> str:
    """One line of numbers for each recipe, or what else the run left behind."""
    if run.recipes:
        return html.metrics_table(recipe_rows(run), run.noise_floor)
    found = run.report.get("similarity")
    if isinstance(found, dict) and found.get("block_error"):
        error, cosine = found.get("output_error"), found.get("map_cosine")
        return html.notice(
            f"Attention of both guidance branches, mean over blocks and steps: relative output error {error:.3f}, "
            f"map cosine {cosine:.3f}{_across_frames(found)}. The Guidance page draws it block by block.", "info",
        )  # fmt: skip
    scan = run.report.get("sensitivity")
    if isinstance(scan, dict) and scan.get("layers"):
        said = f"{len(scan['layers'])} layers, each quantized alone to {', '.join(scan.get('bits') or ())}."
        return html.notice(f"{said} The Layers page draws them.", "info")
    if run.state == "done":
        return html.notice("This run measured no recipe; what it left is stored and will be used again.", "info")
    return html.notice("This run ended before it measured anything.", "info")


def _across_frames(found: dict[str, Any]) -> str:
    temporal = found.get("temporal")
    if not isinstance(temporal, dict):
        return ""
    return f"; across frames {temporal.get('output_error'):.3f} and {temporal.get('map_cosine'):.3f}"


def saved_words(run: StoredRun, *, local: bool) -> str:
    """What a save run left; empty for any other."""
    if saved_folder(run) is None:
        return ""
    return html.notice(f"{export_words(run.report, local=local)} Show it in Compare to download it.", "done")


def recipe_rows(run: StoredRun) -> list[tuple[str, dict[str, Any]]]:
    """Title and facts of every recipe of a run."""
    return [(result.title_of(name, facts), facts) for name, facts in run.recipes.items()]
