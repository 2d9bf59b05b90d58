"""A comparison on the page: three columns, the wipe, the difference map, the SQNR of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import plots
from studio.components import clips, html, saving
from studio.components.events import LATEST
from studio.components.titles import ROLES, column_names, line_colours, title_of, under
from studio.jobs import TRDQError, explain
from studio.services import pictures
from studio.services.sharing import SUFFIX
from studio.services.stored import StoredRun, archive, command_line
from studio.state import LiveRun

CLOSER_HEIGHT = 420
FIRST_GAIN = 4
SQNR_EMPTY = "The latent's distance from full precision, step by step, appears here after a comparison."
NO_PICTURE = "No picture of this pair yet."
Updates = dict[Any, Any]


@dataclass(frozen=True)
class Column:
    """One column's widgets."""

    box: gr.Column
    head: gr.HTML
    image: gr.Image
    cards: gr.HTML


@dataclass(frozen=True)
class ResultView:
    """The widgets of a comparison. `run_id` is kept on the server: the page cannot change it."""

    run_id: gr.State
    same: gr.HTML
    clip_prompt: gr.Dropdown
    clips: gr.HTML
    columns: tuple[Column, ...]
    floor: gr.HTML
    details: gr.Column
    pictures: gr.Column
    prompt: gr.Dropdown
    left: gr.Dropdown
    right: gr.Dropdown
    wipe: gr.ImageSlider
    gain: gr.Radio
    difference: gr.Image
    scale: gr.HTML
    sqnr: gr.Plot
    command: gr.Code
    download: gr.DownloadButton
    save: saving.SaveModel

    def widgets(self) -> list[Any]:
        """Everything that a stored run fills."""
        parts = [part for column in self.columns for part in (column.box, column.head, column.image, column.cards)]
        return [
            self.run_id, self.same, self.clip_prompt, self.clips, *parts, self.floor, self.details, self.pictures,
            self.gain, self.prompt,
            self.left, self.right,
            self.wipe, self.difference,
            self.scale, self.sqnr, self.command, self.download,
        ]  # fmt: skip


def build() -> ResultView:
    """The widgets, empty; what looks closer is hidden until there is something to look at."""
    run_id = gr.State(None)
    same = gr.HTML()
    with gr.Row(elem_classes="tr-choose"):
        clip_prompt = gr.Dropdown(
            [], label="Prompt of the run", elem_id="clip-prompt", interactive=True, visible=False, min_width=240
        )
    shown = clips.build()
    with gr.Row(elem_classes="tr-columns", equal_height=False):
        columns = tuple(_column(index) for index in range(len(ROLES)))
    floor = gr.HTML(elem_id="noise-floor")
    with gr.Column(visible=False, elem_id="details") as details:
        with gr.Column() as compared:
            closer = _closer()
        sqnr = gr.Plot(plots.empty(SQNR_EMPTY), show_label=False, elem_id="sqnr")
        gr.HTML('<h3 class="tr-section">Keep and repeat</h3>')
        command = gr.Code(
            "", language="shell", label="The command that repeats this run", lines=1, interactive=False,
            elem_id="command", show_line_numbers=False, wrap_lines=True, buttons=["copy"],
        )  # fmt: skip
        download = gr.DownloadButton("Download everything", interactive=False, elem_id="download", size="md", scale=0)
        save = saving.build()
    return ResultView(
        run_id=run_id, same=same, clip_prompt=clip_prompt, clips=shown, columns=columns, floor=floor, details=details,
        pictures=compared, sqnr=sqnr, command=command, download=download, save=save, **closer,
    )  # fmt: skip


def _closer() -> dict[str, Any]:
    gr.HTML('<h3 class="tr-section">Look closer</h3>')
    with gr.Row(elem_classes="tr-choose"):
        left = gr.Dropdown([], label="Left", elem_id="wipe-left", interactive=True, min_width=140)
        right = gr.Dropdown([], label="Right", elem_id="wipe-right", interactive=True, min_width=140)
        prompt = gr.Dropdown([], label="Prompt of the run", elem_id="wipe-prompt", interactive=True, min_width=140)
        gain = gr.Radio(
            [(f"x{gain}", gain) for gain in pictures.GAINS], value=FIRST_GAIN, label="Gain of the difference",
            elem_id="gain", interactive=True, min_width=140, elem_classes="tr-segments",
        )  # fmt: skip
    with gr.Row(elem_classes="tr-closer", equal_height=False):
        with gr.Column(min_width=280):
            wipe = gr.ImageSlider(
                label="Wipe: drag the handle", format="png", elem_id="wipe", interactive=False,
                buttons=["fullscreen"], height=CLOSER_HEIGHT, max_height=CLOSER_HEIGHT,
            )  # fmt: skip
        with gr.Column(min_width=280):
            difference = gr.Image(
                label="Difference: right minus left", format="png", elem_id="difference", interactive=False,
                buttons=["download", "fullscreen"], height=CLOSER_HEIGHT,
            )  # fmt: skip
            scale = gr.HTML(html.difference_legend(FIRST_GAIN))
    return {
        "left": left, "right": right, "prompt": prompt, "gain": gain, "wipe": wipe, "difference": difference,
        "scale": scale,
    }  # fmt: skip


def wire(view: ResultView, closer: Any, player: Any) -> None:
    """Draw the closer look again when its pair, prompt or gain changes; `closer` maps their values to the three outputs.

    `player` maps the run and the prompt of a run of clips to its player.
    """
    view.clip_prompt.input(player, [view.run_id, view.clip_prompt], view.clips, **LATEST)
    inputs = [view.run_id, view.left, view.right, view.prompt, view.gain]
    for widget in (view.left, view.right, view.prompt, view.gain):
        widget.input(closer, inputs, [view.wipe, view.difference, view.scale], **LATEST)


def cleared(view: ResultView, names: list[str], same: str, *, moving: bool = False) -> Updates:
    """The updates that empty the view before a new run with these recipes; `moving` for one of clips."""
    updates: Updates = {
        view.run_id: None,
        view.same: f'<p class="tr-same">{same}</p>',
        view.clip_prompt: gr.Dropdown(visible=False),
        view.clips: "",
        view.floor: "",
        view.details: gr.Column(visible=False),
    }
    for index, column in enumerate(view.columns):
        name = names[index] if index < len(names) else ""
        updates |= {
            column.box: gr.Column(visible=bool(name)),
            column.head: html.column_head(ROLES[index], title_of(name, {}), "waiting"),
            column.image: gr.Image(value=None, visible=not moving),
            column.cards: html.cards({}),
        }
    return updates


def live(view: ResultView, run: LiveRun, names: list[str], changed: set[str], *, moving: bool = False) -> Updates:
    """The updates for the columns that changed while a run goes on; `moving` for one of clips."""
    updates: Updates = (
        {view.clips: clips.live_strips(run, names, clips.published(view.clips))} if moving and changed else {}
    )
    for index, name in enumerate(names[: len(view.columns)]):
        if name not in changed:
            continue
        column, facts = view.columns[index], run.results.get(name, {})
        picture = pictures.load(run.pictures[name]) if name in run.pictures and not moving else None
        if picture is not None:
            updates[column.image] = picture
        updates[column.head] = html.column_head(ROLES[index], title_of(name, facts), run.steps.get(name) or "sampled")
        if facts:
            updates[column.cards] = html.cards(facts, reference=index == 0)
    return updates


def stored(view: ResultView, run: StoredRun) -> Updates:
    """The updates that show a stored run in full."""
    names = list(run.recipes)
    shown, moving = column_names(names), clips.is_moving(run)
    pictured = run.has_pictures and not moving
    updates: Updates = {view.run_id: run.id, view.same: _same(run), view.floor: _floor(run, shown)}
    for index, column in enumerate(view.columns):
        name = shown[index] if index < len(shown) else None
        updates[column.box] = gr.Column(visible=name is not None)
        if name is not None:
            facts = run.recipes[name]
            updates[column.head] = html.column_head(ROLES[index], title_of(name, facts), under(name, facts, run))
            seen = pictured and facts.get("kind") != "failed"
            updates[column.image] = gr.Image(value=run.picture(name, 0) if seen else None, visible=seen)
            updates[column.cards] = html.cards(facts, reference=facts.get("kind") == "reference")
    there = [name for name in names if run.recipes[name].get("kind") != "failed"]
    choices = [(title_of(name, run.recipes[name]), name) for name in there]
    left, right = (there[0], there[-1]) if there else (None, None)
    updates |= {
        view.details: gr.Column(visible=True),
        view.pictures: gr.Column(visible=pictured),
        view.gain: FIRST_GAIN,
        view.left: gr.Dropdown(choices=choices, value=left),
        view.right: gr.Dropdown(choices=choices, value=right),
        view.prompt: gr.Dropdown(choices=_prompt_choices(run), value=0),
        view.clip_prompt: gr.Dropdown(choices=_prompt_choices(run), value=0, visible=moving and len(run.prompts) > 1),
        view.clips: player(view, run, 0) if moving else "",
        view.sqnr: gr.Plot(sqnr_figure(run), visible=run.has_pictures),
        view.command: command_line(run),
        view.download: download_of(run),
    }
    look = closer_look(run, left, right, 0, FIRST_GAIN) if pictured else (None, None, "")
    return updates | dict(zip((view.wipe, view.difference, view.scale), look, strict=True))


def player(view: ResultView, run: StoredRun | None, prompt: Any) -> str:
    """The player of a prompt's clips; one sentence where they cannot be gathered."""
    if run is None:
        return ""
    try:
        return clips.player(run, prompt if isinstance(prompt, int) else 0, clips.published(view.clips))
    except TRDQError as error:
        return html.notice(explain(error))


def download_of(run: StoredRun) -> gr.DownloadButton:
    """The button with the run's archive; it says so where there is no room for one."""
    try:
        return gr.DownloadButton("Download everything", value=str(archive(run)), interactive=True)
    except TRDQError as error:
        return gr.DownloadButton(explain(error), value=None, interactive=False)


def closer_look(
    run: StoredRun | None, left: str | None, right: str | None, prompt: int | None, gain: int
) -> tuple[Any, ...]:
    """The wipe's pair, the difference map and its scale bar."""
    gain = gain if gain in pictures.GAINS else FIRST_GAIN
    scale = html.difference_legend(gain)
    if run is None or left is None or right is None:
        return None, None, scale
    pair = run.picture(left, int(prompt or 0)), run.picture(right, int(prompt or 0))
    if pair[0] is None or pair[1] is None:
        return None, None, html.notice(NO_PICTURE, "info")
    both = tuple(pictures.enlarge(picture) for picture in pair)
    return both, pictures.difference(pair[0], pair[1], gain), scale


def sqnr_figure(run: StoredRun) -> Any:
    """The latent SQNR of every quantized recipe of a run."""
    series = {
        title_of(name, facts): facts["latent_sqnr_db"]
        for name, facts in run.recipes.items()
        if facts.get("latent_sqnr_db")
    }
    if not series:
        return plots.empty("This run has no latent SQNR: it compared nothing with full precision.")
    colours = {title_of(name, run.recipes[name]): colour for name, colour in line_colours(list(run.recipes)).items()}
    dashed = {title_of(name, facts) for name, facts in run.recipes.items() if name.endswith(SUFFIX)}
    return plots.latent_sqnr(series, colours, dashed)


def _prompt_choices(run: StoredRun) -> list[tuple[str, int]]:
    return [(f"{index + 1}. {prompt}", index) for index, prompt in enumerate(run.prompts)]


def _floor(run: StoredRun, shown: list[str]) -> str:
    """The noise floor, and every recipe in numbers where there are more than columns."""
    if len(shown) == len(run.recipes):
        return html.noise_floor(run.noise_floor)
    rows = [(title_of(name, facts), facts) for name, facts in run.recipes.items()]
    return html.noise_floor(run.noise_floor) + html.metrics_table(rows, None)


def _same(run: StoredRun) -> str:
    if not run.has_pictures:
        return '<p class="tr-same">A timing only: this run made no pictures, so it says nothing about quality.</p>'
    seed = run.spec.seed if run.spec else 0
    shares = any(facts.get("sharing") for facts in run.recipes.values())
    differs = "the arithmetic of the linears differs"
    differs = f"{differs}, and where it says so attention is shared" if shares else differs
    return (
        f'<p class="tr-same">Same prompt embeddings, same initial latents (seed {seed}), same sampler and decoder in every '
        f"column; only {differs}.</p>"
    )


def _column(index: int) -> Column:
    names = ("Full precision", "Baseline", "TR-DQ")
    with gr.Column(min_width=250, elem_classes=["tr-column", ROLES[index]]) as box:
        head = gr.HTML(html.column_head(ROLES[index], names[index], "nothing sampled yet"))
        image = gr.Image(
            show_label=False, format="png", interactive=False, elem_id=f"picture-{ROLES[index]}",
            buttons=["download", "fullscreen"], container=False, height=320,
        )  # fmt: skip
        cards = gr.HTML(html.cards({}))
    return Column(box, head, image, cards)
