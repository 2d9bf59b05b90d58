"""Clips of a run side by side: the player, wipe and difference, the curves of each frame. Drawn by assets/js/clips.js."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import gradio as gr

from studio.components import curves, html
from studio.components.curves import Curve
from studio.components.titles import line_colours, title_of
from studio.services import clips as services
from studio.services import pictures
from studio.services.clips import SHEET_COLUMNS, Clip, ClipShape
from studio.services.stored import StoredRun
from studio.state import LiveRun

SCRIPT = Path(__file__).resolve().parents[2] / "assets" / "js" / "clips.js"
FIRST_GAIN = 4
SPEEDS = (0.25, 0.5, 1, 2)
Publish = Callable[[Path], str]

PIXELS = (
    "The videos are mp4 files (H.264, compressed). Filmstrips, wipe, difference and every number come from the exact PNG "
    "frames; tick Exact frames to play those instead."
)
GONE = "The frames of these clips are not there any more."
TEMPORAL_ERROR = (
    "RMS difference of the change from frame to frame from the reference's, in grey levels of 255: flicker."
)
MOTION_RATIO = (
    "Energy of the change from frame to frame over the reference's: 1 moves as much, less is stiller, more flickers."
)


class Strip(NamedTuple):
    """A filmstrip of a recipe that is being sampled, or was when the run was stopped."""

    title: str
    colour: str
    said: str
    image: Path


def build() -> gr.HTML:
    """The component, empty."""
    return gr.HTML(elem_id="clips", js_on_load=SCRIPT.read_text(encoding="utf-8"))


def published(component: gr.HTML) -> Publish:
    """What makes a file of the run's something that the page can fetch: a copy among gradio's served files."""

    def publish(path: Path) -> str:
        copy = component.move_resource_to_block_cache(str(path)) or str(path)
        return f"gradio_api/file={quote(Path(copy).as_posix(), safe='/:')}"

    return publish


def strips(rows: Sequence[Strip], publish: Publish) -> str:
    """Filmstrips below each other, as wide as the page: clips in the making."""
    body = "".join(
        f'<figure class="tr-strip-row" style="--tr-own:{row.colour}"><figcaption><b>{escape(row.title)}</b>'
        f'<span>{escape(row.said)}</span></figcaption><img alt="Filmstrip of {escape(row.title)}, {escape(row.said)}" '
        f'src="{publish(row.image)}"></figure>'
        for row in rows
    )
    return f'<div class="tr-strips">{body}</div>' if rows else ""


def is_moving(run: StoredRun) -> bool:
    """Whether a run makes clips, finished or not."""
    return services.makes_clips(run)


def live_strips(run: LiveRun, names: Sequence[str], publish: Publish) -> str:
    """The filmstrips of a run that goes on, as far as it is; `names` are its recipes as the columns have them."""
    colours = line_colours(list(dict.fromkeys([*names, *run.pictures])))
    rows = [
        Strip(title_of(name, run.results.get(name, {})), colours[name], run.steps.get(name) or "sampled", image)
        for name, image in run.pictures.items()
        if name != services.NOISE_FLOOR
    ]
    return strips(rows, publish)


def partial_strips(run: StoredRun) -> list[Strip]:
    """What a stopped run left of the recipes that it did not finish."""
    colours = _colours(run)
    return [Strip(title_of(one.recipe, {}), colours[one.recipe], one.said, one.image) for one in services.partials(run)]


def run_strips(run: StoredRun, publish: Publish) -> str:
    """Every filmstrip of a run, prompt by prompt, and those of what it did not finish."""
    colours, rows = _colours(run), []
    for index, prompt in enumerate(run.prompts):
        for name, facts in run.recipes.items():
            image = services.strip_of(run, name, index)
            if image is not None:
                rows.append(Strip(title_of(name, facts), colours[name], prompt, image))
    return strips([*rows, *partial_strips(run)], publish)


def _colours(run: StoredRun) -> dict[str, str]:
    """A colour for each recipe of the run, finished or not."""
    asked = [recipe.name for recipe in run.spec.recipes] if run.spec else []
    return line_colours(list(dict.fromkeys([services.REFERENCE, *run.recipes, *asked])))


def player(run: StoredRun, prompt: int, publish: Publish) -> str:
    """Everything about the clips of one prompt of a run, and what it left unfinished."""
    shape, found = services.shape_of(run), services.clips_of(run, prompt)
    rest = strips(partial_strips(run), publish)
    if shape is None or not found:
        kept = any(facts.get("frames") for facts in run.recipes.values())  # a timing keeps none
        return html.notice(GONE if kept else "", "info") + rest
    colours = _colours(run)
    said = run.prompts[prompt] if prompt < len(run.prompts) else ""
    figures = "".join(_figure(clip, shape, said, colours[clip.recipe], publish) for clip in found)
    playable = all(clip.video for clip in found)
    note = f'<p class="tr-notice info tr-clip-note" {"hidden" if playable else ""}>{"" if playable else _no_video(run)}</p>'
    return (
        f'<div class="tr-clips" data-clips="{escape(_data(found, shape, publish))}">{_transport(shape)}{note}'
        '<div class="tr-clip-columns" tabindex="0" role="group" aria-label="Clips. Space plays and pauses, left and right '
        f'arrow step by one frame.">{figures}</div><p class="tr-small">{PIXELS}</p>{rest}'
        f"{_closer(found, shape) if len(found) > 1 else ''}{_curves(found, colours)}{_table(found)}</div>"
    )


def _no_video(run: StoredRun) -> str:
    return f"{escape(services.why_no_video(run).rstrip('.'))}: the exact PNG frames are played instead."


def _data(found: Sequence[Clip], shape: ClipShape, publish: Publish) -> str:
    own = [
        {
            "title": title_of(clip.recipe, clip.facts), "sheet": publish(clip.sheet), "video": clip.video is not None,
            "psnr": clip.psnr, "ssim": clip.ssim,
        }
        for clip in found
    ]  # fmt: skip
    return json.dumps(
        shape._asdict() | {"columns": min(SHEET_COLUMNS, shape.frames), "clips": own}, separators=(",", ":")
    )


def _transport(shape: ClipShape) -> str:
    speeds = "".join(
        f'<option value="{speed:g}"{" selected" if speed == 1 else ""}>{speed:g}x</option>' for speed in SPEEDS
    )
    return (
        '<div class="tr-transport" role="group" aria-label="Playback of all clips together">'
        '<button type="button" class="tr-play" data-do="play">Play</button>'
        '<button type="button" data-do="back" aria-label="One frame back" title="One frame back">&#8249;</button>'
        '<button type="button" data-do="forward" aria-label="One frame forward" title="One frame forward">&#8250;</button>'
        f'<input type="range" data-do="seek" min="0" max="{shape.frames - 1}" step="1" value="0" aria-label="Frame">'
        '<span class="tr-clip-at"><b class="tr-clip-frame"></b> <span class="tr-clip-time"></span></span>'
        '<label><input type="checkbox" data-do="loop" checked> Loop</label>'
        f'<label>Speed <select data-do="speed">{speeds}</select></label>'
        '<label><input type="checkbox" data-do="exact"> Exact frames</label></div>'
    )


def _figure(clip: Clip, shape: ClipShape, prompt: str, colour: str, publish: Publish) -> str:
    title, stem = escape(title_of(clip.recipe, clip.facts)), escape(clip.archive.stem)
    video = f'src="{publish(clip.video)}"' if clip.video else ""
    columns = min(SHEET_COLUMNS, shape.frames)
    mark = f"width:{100 / columns:.3f}%;height:{100 / -(-shape.frames // columns):.3f}%"
    links = [f'<a href="{publish(clip.video)}" download="{stem}.mp4">mp4</a>'] if clip.video else []
    links.append(
        f'<a href="{publish(clip.archive)}" download="{stem}.zip"title="The PNG frames as a zip">frames (zip)</a>'
    )
    return (
        f'<figure class="tr-clip" style="--tr-own:{colour}"><figcaption><b>{title}</b><span class="tr-clip-now"></span>'
        f'</figcaption><div class="tr-clip-screen" style="aspect-ratio:{shape.width}/{shape.height}">'
        f'<video {video} muted playsinline preload="auto" aria-label="{title}: {escape(prompt)}"></video>'
        f'<canvas width="{shape.width}" height="{shape.height}" role="img" aria-label="{title}, exact frame" hidden></canvas>'
        f'</div><div class="tr-sheet"><img alt="Filmstrip of {title}: all {shape.frames} frames" src="{publish(clip.sheet)}">'
        f'<i style="{mark}"></i></div><p class="tr-small">Download: {" · ".join(links)}</p></figure>'
    )


def _closer(found: Sequence[Clip], shape: ClipShape) -> str:
    options = [
        f'<option value="{index}">{escape(title_of(c.recipe, c.facts))}</option>' for index, c in enumerate(found)
    ]
    right = [*options[:-1], options[-1].replace("<option", "<option selected", 1)]
    gains = "".join(
        f'<label><input type="radio" name="tr-gain" value="{gain}"{" checked" if gain == FIRST_GAIN else ""}> x{gain}</label>'
        for gain in pictures.GAINS
    )
    scales = "".join(
        f'<div data-gain="{gain}" {"" if gain == FIRST_GAIN else "hidden"}>{html.difference_legend(gain)}</div>'
        for gain in pictures.GAINS
    )
    canvas = f'<canvas width="{shape.width}" height="{shape.height}"></canvas>'
    box = f'style="aspect-ratio:{shape.width}/{shape.height}"'
    return (
        '<h3 class="tr-section">Look closer</h3><div class="tr-pick">'
        f'<label>Left <select data-do="left">{"".join(options)}</select></label>'
        f'<label>Right <select data-do="right">{"".join(right)}</select></label>'
        f"<fieldset><legend>Gain of the difference</legend>{gains}</fieldset></div>"
        f'<div class="tr-looks"><figure><figcaption>Wipe: drag the line, or use the arrow keys</figcaption>'
        f'<div class="tr-wipe" {box} tabindex="0" role="slider" aria-label="Wipe between the left and the right clip" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="50">{canvas}<i></i><span class="tr-wipe-left"></span>'
        '<span class="tr-wipe-right"></span></div></figure>'
        f'<figure class="tr-difference"><figcaption>Difference: right minus left</figcaption><div {box} role="img" '
        f'aria-label="Difference of the right and the left clip in this frame">{canvas}</div>{scales}</figure></div>'
    )


def _curves(found: Sequence[Clip], colours: dict[str, str]) -> str:
    measured = [clip for clip in found if clip.psnr is not None and clip.ssim is not None]
    if not measured:
        return ""
    both = []
    for values in ("psnr", "ssim"):
        both.append(
            [Curve(title_of(c.recipe, c.facts), colours[c.recipe], getattr(c, values), c.worst_frame) for c in measured]
        )
    return (
        f'<h3 class="tr-section">Frame by frame</h3>{curves.legend(both[0])}<div class="tr-looks">'
        f"{curves.panel('tr-curve-psnr', 'PSNR of each frame against the reference, dB', both[0], 1)}"
        f"{curves.panel('tr-curve-ssim', 'SSIM of each frame against the reference', both[1], 3)}</div>"
        '<p class="tr-small">A click seeks every clip to that frame; in a chart the arrow keys step. A gap in a line of PSNR '
        "is a frame that equals the reference.</p>"
    )


def _table(found: Sequence[Clip]) -> str:
    measured = [clip for clip in found if clip.psnr is not None]
    if not measured:
        return ""
    names = ("recipe", "PSNR, mean of frames", "SSIM, mean of frames", "temporal error", "motion ratio", "worst frame")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(_row(clip) for clip in measured)
    return (
        f'<div class="tr-table tr-motion" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<ul class="tr-small tr-meanings"><li><b>Temporal error:</b> {TEMPORAL_ERROR}</li>'
        f"<li><b>Motion ratio:</b> {MOTION_RATIO}</li></ul>"
    )


def _row(clip: Clip) -> str:
    finite = [value for value in clip.psnr or () if value is not None]
    psnr = f"{sum(finite) / len(finite):.1f} dB" if finite else "identical"
    ssim = f"{sum(clip.ssim) / len(clip.ssim):.3f}" if clip.ssim else "–"
    cells = (psnr, ssim, html.temporal_text(clip.temporal_error), html.ratio_text(clip.motion_ratio))
    worst, value = clip.worst_frame, clip.psnr[clip.worst_frame] if clip.psnr and clip.worst_frame is not None else None
    last = "none" if worst is None else (
        f'<button type="button" class="tr-link" data-seek="{worst}">frame {worst}</button>'
        + (f" ({value:.1f} dB)" if value is not None else "")
    )  # fmt: skip
    numbers = "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
    return f"<tr><td>{escape(title_of(clip.recipe, clip.facts))}</td>{numbers}<td>{last}</td></tr>"
