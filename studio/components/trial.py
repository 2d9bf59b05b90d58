"""One prompt without and with attention sharing, side by side: pictures, their difference, times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from studio.components import html, words
from studio.components.result import FIRST_GAIN
from studio.components.titles import title_of
from studio.services import clips, pictures
from studio.services.sharing import BASE_CHOICES, pair_of
from studio.services.stored import StoredRun
from studio.state import LiveRun

HEIGHT, STRIP_HEIGHT = 320, 72  # of a picture, and of a filmstrip in a column
WAITING = "waiting"
Updates = dict[Any, Any]


@dataclass(frozen=True)
class TrialView:
    """The widgets. `run_id` is kept on the server."""

    run_id: gr.State
    base: gr.Radio
    start: gr.Button
    cancel: gr.Button
    strip: gr.HTML
    box: gr.Column
    heads: tuple[gr.HTML, gr.HTML]
    images: tuple[gr.Image, gr.Image]
    gain: gr.Radio
    difference: gr.Image
    scale: gr.HTML
    numbers: gr.HTML

    def widgets(self) -> list[Any]:
        """Everything that a stored trial fills."""
        return [
            self.run_id, self.box, *self.heads, *self.images, self.gain, self.difference, self.scale, self.numbers,
        ]  # fmt: skip


def build() -> TrialView:
    """The widgets, the results hidden until there are some."""
    run_id = gr.State(None)
    with gr.Row(elem_classes="tr-choose"):
        base = gr.Radio(
            BASE_CHOICES, value="fp", label="Share in", elem_id="trial-base", interactive=True, min_width=260, scale=3,
            elem_classes="tr-segments",
        )  # fmt: skip
        start = gr.Button("Try it", variant="primary", elem_id="try", min_width=110)
        cancel = gr.Button("Cancel", elem_id="cancel-try", min_width=90)
    strip = gr.HTML(elem_id="trial-strip")
    with gr.Column(visible=False, elem_id="trial") as box:
        with gr.Row(elem_classes="tr-columns", equal_height=False):
            without, with_it = _column("reference", "without"), _column("chosen", "with")
            with gr.Column(min_width=250, elem_classes="tr-column"):
                gr.HTML(html.column_head("baseline", "Difference", "with minus without"))
                difference = gr.Image(
                    show_label=False, format="png", elem_id="trial-difference", interactive=False, container=False,
                    buttons=["download", "fullscreen"], height=HEIGHT,
                )  # fmt: skip
                scale = gr.HTML(html.difference_legend(FIRST_GAIN))
                gain = gr.Radio(
                    [(f"x{gain}", gain) for gain in pictures.GAINS], value=FIRST_GAIN, label="Gain of the difference",
                    elem_id="trial-gain", interactive=True, elem_classes="tr-segments",
                )  # fmt: skip
        numbers = gr.HTML(elem_id="trial-numbers")
    heads, images = (without[0], with_it[0]), (without[1], with_it[1])
    return TrialView(run_id, base, start, cancel, strip, box, heads, images, gain, difference, scale, numbers)


def _column(role: str, name: str) -> tuple[gr.HTML, gr.Image]:
    with gr.Column(min_width=250, elem_classes=["tr-column", role]):
        head = gr.HTML(html.column_head(role, name.capitalize(), WAITING))
        image = gr.Image(
            show_label=False, format="png", interactive=False, elem_id=f"trial-{name}", container=False, height=HEIGHT,
            buttons=["download", "fullscreen"],
        )  # fmt: skip
    return head, image


def cleared(view: TrialView, pair: tuple[str, str]) -> Updates:
    """The updates that empty the view before a new trial of this pair."""
    updates: Updates = {
        view.run_id: None, view.box: gr.Column(visible=True), view.difference: None, view.numbers: "",
    }  # fmt: skip
    for index, name in enumerate(pair):
        updates |= {
            view.heads[index]: _head(index, name, {}, WAITING),
            view.images[index]: gr.update(value=None, height=HEIGHT),
        }
    return updates


def live(view: TrialView, run: LiveRun, pair: tuple[str, str], changed: set[str]) -> Updates:
    """The updates for the pictures that changed while the trial goes on."""
    updates: Updates = {}
    for index, name in enumerate(pair):
        picture = pictures.load(run.pictures[name]) if name in changed and name in run.pictures else None
        if picture is not None:
            said = run.steps.get(name) or "sampled"
            updates |= {view.images[index]: _fitted(picture), view.heads[index]: _head(index, name, {}, said)}
    return updates


def stored(view: TrialView, run: StoredRun | None) -> Updates:
    """The updates that show a stored trial; none if the run has no pair."""
    pair = pair_of(run)
    if run is None or pair is None or not all(name in run.recipes for name in pair):
        return {view.run_id: None}
    updates: Updates = {view.run_id: run.id, view.box: gr.Column(visible=True), view.gain: FIRST_GAIN}
    for index, name in enumerate(pair):
        prompt = run.prompts[0] if run.prompts else ""
        updates |= {
            view.heads[index]: _head(index, name, run.recipes[name], prompt),
            view.images[index]: _fitted(run.picture(name, 0)),
        }
    updates |= dict(zip((view.difference, view.scale), difference(run, FIRST_GAIN), strict=True))
    return updates | {view.numbers: numbers(run, pair)}


def _fitted(picture: Any) -> Any:
    """A picture in the box; a filmstrip in one that is as low as it needs."""
    if picture is None or picture.width < 3 * picture.height:
        return picture
    return gr.update(value=picture, height=STRIP_HEIGHT)


def difference(run: StoredRun | None, gain: Any) -> tuple[Any, str]:
    """The difference map of a trial and its scale bar."""
    gain = gain if gain in pictures.GAINS else FIRST_GAIN
    pair = pair_of(run)
    both = [run.picture(name, 0) for name in pair] if run and pair else [None, None]
    if both[0] is None or both[1] is None:
        return None, html.difference_legend(gain)
    return _fitted(pictures.difference(both[0], both[1], gain)), html.difference_legend(gain)


def numbers(run: StoredRun, pair: tuple[str, str]) -> str:
    """PSNR of the pair, and the time of a step of both with its spread."""
    value = clips.psnr_of_pair(run, *pair, 0)
    of = "the mean over the frames of one clip" if clips.makes_clips(run) else "one prompt"
    said = "not measured" if value is None else "identical" if math.isinf(value) else f"{value:.1f} dB"
    facts = [run.recipes[name] for name in pair]
    rows = "".join(_row(title_of(name, row), row) for name, row in zip(pair, facts, strict=True))
    head = "".join(
        f"<th>{name}</th>" for name in ("recipe", "step, median", "p10 to p90", "n", "PSNR to FP", "sharing")
    )
    return (
        f'<p class="tr-plan-said"><b>PSNR with against without sharing: {said}</b> ({of}, the same seed).'
        f"{_ratio(facts)}</p>"
        f'<div class="tr-table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{html.noise_floor(run.noise_floor)}"
    )


def _ratio(facts: list[dict[str, Any]]) -> str:
    times = [row.get("step_ms") or {} for row in facts]
    without, with_it = (time.get("median") for time in times)
    if not without or not with_it:
        return ""
    apart = times[1]["p90"] < times[0]["p10"] or times[0]["p90"] < times[1]["p10"]
    sure = "the spreads do not overlap" if apart else "the spreads overlap, so this may be chance"
    return f" A step takes {with_it / without:.2f} of the time without; {sure}."


def _row(name: str, facts: dict[str, Any]) -> str:
    times = facts.get("step_ms")
    if times:
        spread = f"{words.milliseconds(times.get('p10'))} to {words.milliseconds(times.get('p90'))}"
        step = (words.milliseconds(times.get("median")), spread, str(times.get("n", "")))
    else:
        step = ("–", "simulated, no time" if facts.get("simulated") else "–", "")
    reference = facts.get("kind") == "reference"
    quality = "the reference" if reference else html.psnr_text(facts) or "–"
    cells = "".join(f'<td class="num">{escape(cell)}</td>' for cell in (*step, quality))
    return f"<tr><td>{escape(name)}</td>{cells}<td>{html.sharing_badge(facts) or 'none'}</td></tr>"


def _head(index: int, name: str, facts: dict[str, Any], under: str) -> str:
    return html.column_head(("reference", "chosen")[index], title_of(name, facts), under)
