"""A heatmap as HTML: read by pointer and by keyboard, sharp at any width. gr.Plot knows no click, so this is not one."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.colors
from PIL import Image

Array = np.ndarray[Any, Any]
MOST_LABELS = {"rows": 16, "columns": 9}
FIELD_HEIGHT, LEAST_ROW, MOST_ROW = 300, 13, 34  # pixels
BAR_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)

# Runs once in the browser. The listeners sit on the component, whose content is replaced at every update.
ON_LOAD = """
let row = 0, column = 0, refocus = false;
const field = () => element.querySelector('.tr-map-field');
const data = () => JSON.parse(field().dataset.map);
const show = () => {
  const map = data(), rows = map.v.length, columns = map.t.length;
  row = Math.min(Math.max(row, 0), rows - 1); column = Math.min(Math.max(column, 0), columns - 1);
  const cursor = element.querySelector('.tr-map-cursor');
  Object.assign(cursor.style, {display: 'block', left: 100 * column / columns + '%', top: 100 * row / rows + '%',
    width: 100 / columns + '%', height: 100 / rows + '%'});
  element.querySelector('.tr-map-say').textContent = map.row + ' ' + row + ', timestep ' + map.t[column] + ': '
    + map.measure + ' ' + map.v[row][column] + (map.s[row][column] === '1' ? ', shared' : '');
};
const point = (event) => {
  const box = field().getBoundingClientRect(), map = data();
  column = Math.floor((event.clientX - box.left) / box.width * map.t.length);
  row = Math.floor((event.clientY - box.top) / box.height * map.v.length);
  show();
};
const inside = (event) => event.target.closest && event.target.closest('.tr-map-field');
element.addEventListener('pointermove', (event) => { if (inside(event)) point(event); });
element.addEventListener('focusin', (event) => { if (inside(event) && event.target.matches(':focus-visible')) show(); });
element.addEventListener('click', (event) => { if (inside(event)) { point(event); trigger('select', {row, column}); } });
element.addEventListener('keydown', (event) => {
  if (!inside(event)) return;
  const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  if (moves[event.key]) { row += moves[event.key][0]; column += moves[event.key][1]; show(); event.preventDefault(); }
  if (event.key === 'Enter' || event.key === ' ') { refocus = true; trigger('select', {row, column}); event.preventDefault(); }
});
watch('value', () => { if (refocus && field()) { refocus = false; field().focus(); } });
"""


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """What is drawn: `values` and `gap` are (columns, rows); `gap` from 0 to `widest` sets the colour."""

    title: str
    row: str  # what a row is called, "block"
    measure: str  # what a value is called, "output error"
    values: Array
    gap: Array
    widest: float
    timesteps: Array  # rising, one a column
    shared: Array  # of bool, marked
    edges: tuple[float, ...] = ()  # borders of the time groups
    chosen: int | None = None  # the row whose heads are shown


def heatmap(chart: Heatmap) -> str:
    """The chart with its axes."""
    rows = chart.values.shape[1]
    height = rows * int(np.clip(FIELD_HEIGHT / rows, LEAST_ROW, MOST_ROW))
    label = f"{chart.title}. Arrow keys read the cells." + (
        " Enter shows the heads." if chart.chosen is not None else ""
    )
    field = (
        f'<div class="tr-map-field" tabindex="0" role="application" aria-roledescription="heatmap" '
        f'aria-label="{escape(label)}" data-map="{escape(_data(chart))}" style="height:{height}px">'
        f'<img alt="" src="{_picture(chart.gap, chart.widest)}">{_marks(chart.shared)}{_borders(chart)}'
        '<i class="tr-map-cursor"></i></div>'
    )
    return (
        f'<div class="tr-map"><b class="tr-map-title">{escape(chart.title)}</b><div class="tr-map-grid">'
        f'<div class="tr-map-rows" aria-hidden="true"><em>{escape(chart.row)}</em>{_row_labels(chart)}</div>{field}'
        f'<div class="tr-map-columns" aria-hidden="true">{_column_labels(chart.timesteps)}</div></div>'
        '<p class="tr-map-axis">timestep (sampling runs from right to left)</p>'
        f'<p class="tr-map-say" role="status">Point at a cell to read it.</p></div>'
    )


def colour_bar(measure: str, widest: float, *, cosine: bool, shared: bool = True) -> str:
    """The colour range that all heatmaps of the page have, with the values it stands for, and the mark of `shared` cells."""
    gaps = [widest * stop**2 for stop in BAR_STOPS]
    said = [f"{1 - gap if cosine else gap:.3g}" for gap in gaps]
    colours = ", ".join(f"rgb{tuple(int(part) for part in colour)}" for colour in _ramp(np.linspace(0, 1, 9)))
    ticks = "".join(f"<span>{text}</span>" for text in said)
    mark = ' <i class="tr-map-key"></i> hatched and outlined: shared by the plan.' if shared else ""
    return (
        f'<div class="tr-map-bar"><b>{escape(measure)}</b><div><i style="background:linear-gradient(90deg, {colours})"></i>'
        f"<p>{ticks}</p></div></div>"
        f'<p class="tr-small">One colour range for blocks and heads, from {said[0]} to {said[-1]}; '
        f"the steps between are squares, so that small differences stay apart.{mark}</p>"
    )


def _data(chart: Heatmap) -> str:
    return json.dumps(
        {
            "row": chart.row, "measure": chart.measure, "t": [round(float(t)) for t in chart.timesteps],
            "v": [[f"{value:.4g}" for value in line] for line in chart.values.T],
            "s": ["".join("1" if cell else "0" for cell in line) for line in chart.shared.T],
        },
        separators=(",", ":"),
    )  # fmt: skip


def _ramp(shares: Array) -> Array:
    """Colours (n, 3) from dark blue to yellow, of which lightness alone tells the order."""
    scale = plotly.colors.get_colorscale("cividis")
    stops = np.array([position for position, _ in scale])
    colours = np.array([plotly.colors.hex_to_rgb(colour) for _, colour in scale], dtype=np.float64)
    return np.stack([np.interp(shares, stops, colours[:, channel]) for channel in range(3)], axis=-1)


def _picture(gap: Array, widest: float) -> str:
    """One pixel a cell, as a PNG inside the page."""
    shares = np.sqrt(np.clip(gap.T / widest, 0.0, 1.0))
    colours = _ramp(shares.ravel()).reshape(*shares.shape, 3)
    stream = io.BytesIO()
    Image.fromarray(np.rint(colours).astype(np.uint8)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _marks(shared: Array) -> str:
    """One box for each run of shared neighbours in a row."""
    columns, rows = shared.shape
    boxes = []
    for row in range(rows):
        padded = np.concatenate(([False], shared[:, row], [False])).astype(int)
        starts, ends = np.flatnonzero(np.diff(padded) == 1), np.flatnonzero(np.diff(padded) == -1)
        boxes += [
            f'<i class="tr-map-shared" style="left:{100 * start / columns:.3f}%;top:{100 * row / rows:.3f}%;'
            f'width:{100 * (end - start) / columns:.3f}%;height:{100 / rows:.3f}%"></i>'
            for start, end in zip(starts, ends, strict=True)
        ]
    return "".join(boxes)


def _borders(chart: Heatmap) -> str:
    count = len(chart.timesteps)
    places = sorted({int(np.searchsorted(chart.timesteps, edge)) for edge in chart.edges} - {0, count})
    return "".join(f'<i class="tr-map-edge" style="left:{100 * place / count:.3f}%"></i>' for place in places)


def _row_labels(chart: Heatmap) -> str:
    rows = chart.values.shape[1]
    every = -(-rows // MOST_LABELS["rows"])
    shown = [row for row in range(rows) if row % every == 0 or row == chart.chosen]
    return "".join(
        f'<span class="{"now" if row == chart.chosen else ""}" style="top:{100 * (row + 0.5) / rows:.3f}%">{row}</span>'
        for row in shown
    )


def _column_labels(timesteps: Array) -> str:
    count = len(timesteps)
    every = -(-count // MOST_LABELS["columns"])
    return "".join(
        f'<span class="{"minor" if index // every % 2 else ""}" style="left:{100 * (index + 0.5) / count:.3f}%">'
        f"{timesteps[index]:.0f}</span>"
        for index in range(0, count, every)
    )
