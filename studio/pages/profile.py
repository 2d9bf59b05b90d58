"""Profile: where the time of a denoiser step goes, part by part and kernel by kernel, in the runs that measured it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import plots, profile_plots
from studio.components import html, profile
from studio.components.clips import published
from studio.components.command import command_box, shown
from studio.components.events import QUICK
from studio.components.titles import title_of
from studio.context import Studio
from studio.services.stored import StoredRun, command_line

BARS_EMPTY = "One bar for each recipe of a profile, cut into linears, attention, quantization, norms and the rest."
ROOFLINE_EMPTY = "Each kind of kernel call below what this machine can do at most."
HOW = (
    "Run python -m trdq_core profile --model pocket-image --recipes fp,rtn-w8a8,tr-dq-w8a8, or press Compare with the model "
    "random-dit; its profile is then shown here."
)
TRACE = "trace.json"  # of several recipes each gets its name in the file's
Updates = dict[Any, Any]


@dataclass(frozen=True)
class ProfilePage:
    """The page's widgets."""

    empty: gr.HTML
    run: gr.Dropdown
    note: gr.HTML
    bars: gr.Plot
    parts: gr.HTML
    roofline: gr.Plot
    calls: gr.HTML
    traces: gr.HTML
    command: gr.Code


def build() -> ProfilePage:
    """The page, empty."""
    empty = gr.HTML(elem_id="profile-empty")
    run = gr.Dropdown([], label="Profile", elem_id="profile-run", interactive=True, min_width=260)
    note = gr.HTML(elem_id="profile-note")
    bars = gr.Plot(plots.empty(BARS_EMPTY, 320), show_label=False, elem_id="profile-bars")
    parts = gr.HTML(elem_id="profile-parts")
    roofline = gr.Plot(plots.empty(ROOFLINE_EMPTY, 440), show_label=False, elem_id="profile-roofline")
    calls = gr.HTML(elem_id="profile-calls")
    traces = gr.HTML(elem_id="profile-traces")
    command = command_box(
        label="The command that repeats this profile and writes its traces", elem_id="profile-command"
    )
    return ProfilePage(empty, run, note, bars, parts, roofline, calls, traces, command)


def wire(studio: Studio, page: ProfilePage, tab: gr.Tab) -> None:
    """Connect the page: the list is read when the tab is opened, a profile when one is chosen."""
    handlers = _Handlers(studio, page)
    shown = [page.note, page.bars, page.parts, page.roofline, page.calls, page.traces, page.command]
    tab.select(handlers.enter, page.run, [page.empty, page.run, *shown], **QUICK)
    page.run.input(handlers.show, page.run, shown, **QUICK)


@dataclass(frozen=True)
class _Handlers:
    """The handlers."""

    studio: Studio
    page: ProfilePage

    def enter(self, chosen: str | None) -> Updates:
        """The stored profiles, newest first, the one that was shown kept."""
        rows = [row for row in self.studio.runs.rows() if row.command == "profile" and row.state == "done"]
        choices = [(f"{row.created}, {row.model}: {row.recipes}", row.id) for row in rows]
        if not choices:
            return {self.page.empty: html.empty_state("No profiles yet", HOW), self.page.run: gr.Dropdown(choices=[])}
        value = chosen if chosen in [run_id for _, run_id in choices] else choices[0][1]
        return {self.page.empty: "", self.page.run: gr.Dropdown(choices=choices, value=value)} | self.show(value)

    def show(self, run_id: str | None) -> Updates:
        """One stored profile."""
        page, run = self.page, self.studio.runs.open(run_id)
        if run is None:
            raise gr.Error("This profile is not there any more; open the tab again.", print_exception=False)
        rows = {title_of(name, facts): facts for name, facts in run.recipes.items()}
        splits = {title: facts["split"] for title, facts in rows.items() if facts.get("split")}
        calls = {title: facts["roofline"] for title, facts in rows.items() if facts.get("roofline")}
        traces = {title_of(name, run.recipes[name]): path for name, path in run.traces.items()}
        peaks = run.report.get("peaks") or {}
        return {
            page.note: note_of(run, rows),
            page.bars: profile_plots.split_bars(splits) if splits else plots.empty(BARS_EMPTY, 320),
            page.parts: profile.parts_table(run.report, rows),
            page.roofline: profile_plots.roofline(calls, peaks) if calls else plots.empty(ROOFLINE_EMPTY, 440),
            page.calls: profile.calls_table(calls),
            page.traces: profile.trace_links(traces, published(page.traces)),
            page.command: shown(f"{command_line(run)} --trace {TRACE}" if run.spec else ""),
        }


def note_of(run: StoredRun, rows: dict[str, dict[str, Any]]) -> str:
    """What the figures are of: machine, peaks, what the profiler added, and what is left out."""
    if not any(facts.get("split") for facts in rows.values()):
        return html.notice("This run was made before profiles took a step apart; run it again.", "info")
    machine, peaks = run.report.get("machine") or {}, run.report.get("peaks") or {}
    words = [f"{machine.get('cpu', 'unknown CPU')}, {machine.get('threads', '?')} threads."]
    words.append(f"Measured: copy {peaks['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    for key, unit in (("float_operations_per_s", "float32"), ("integer_operations_per_s", "int8")):
        if peaks.get(key):
            words[-1] += f", {unit} {peaks[key] / 1e9:.0f} G operations/s"
    words[-1] += "."
    splits = [facts["split"] for facts in rows.values() if facts.get("split")]
    slower = max(split["total_ms"] / split["plain_ms"] for split in splits)
    whose = "no part holds that" if all("how" in split for split in splits) else "the rest holds that"  # older runs
    words.append(f"Under the profiler a step took up to {slower:.2f} times as long; {whose}.")
    simulated = [title for title, facts in rows.items() if facts.get("simulated")]
    if simulated:
        words.append(f"Simulated, so without times: {', '.join(simulated)}.")
    return html.notice(" ".join(words), "info")
