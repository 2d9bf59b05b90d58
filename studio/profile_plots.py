"""Figures of a profile: where the time of a step goes, and how far each kernel call is from what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from studio.plots import COLUMN_COLOURS, GRID, LIMIT, OTHERS, REFERENCE, layout

PARTS: dict[str, tuple[str, str]] = {
    "linears": ("linears", "#0e7c72"),
    "attention": ("attention", "#cc7a14"),
    "rotation_quantization": ("rotation and quantization", "#6f5fd0"),
    "norms_modulation": ("norms, modulation, gates", "#2f8fd0"),
    "activations": ("activation functions", "#c2558f"),
    "rest": ("the rest", REFERENCE),
}
ROW = 46  # px of one bar


def split_bars(splits: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """One bar a recipe, stacked by what its step went into; `splits` are the "split" of report rows by title."""
    figure = go.Figure()
    names = list(splits)
    for key, (words, colour) in PARTS.items():
        values = [split["parts_ms"][key] for split in splits.values()]
        shares = [
            100 * value / (sum(split["parts_ms"].values()) or 1.0)
            for value, split in zip(values, splits.values(), strict=True)
        ]
        figure.add_trace(
            go.Bar(
                y=names, x=values, name=words, orientation="h", marker={"color": colour, "line": {"width": 0}},
                customdata=shares, hovertemplate=f"{words}: %{{x:.2f}} ms, %{{customdata:.0f}} %<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(**layout("One step", "ms", "", 190 + ROW * len(names)))
    figure.update_layout(barmode="stack", bargap=0.35, hovermode="closest", showlegend=True, margin={"t": 44})
    # Below the bars: on a phone it has a line for each part, which would run into the title.
    figure.update_layout(legend={"traceorder": "normal", "yref": "container", "y": 0.01, "yanchor": "bottom"})
    figure.update_yaxes(autorange="reversed", title=None)
    return figure


def roofline(rows: Mapping[str, Sequence[Mapping[str, Any]]], peaks: Mapping[str, Any]) -> go.Figure:
    """Operations a second over operations a byte of each kind of call, below the measured roofs, on logarithmic axes."""
    figure = go.Figure()
    points = [row for own in rows.values() for row in own if row["operations"] and row["bytes"]]
    places = [row["operations_per_byte"] for row in points] or [1.0]
    low, high = min(places) / 4, max(places) * 4
    bandwidth = peaks["copy_bytes_per_s"]
    for key, words, dash in (
        ("integer_operations_per_s", "int8 peak", "solid"),
        ("float_operations_per_s", "float32 peak", "dash"),
    ):
        if peaks.get(key):
            figure.add_trace(_roof(words, dash, bandwidth, peaks[key], low, high))
    colours = (*COLUMN_COLOURS[1:], *OTHERS)
    for index, (name, own) in enumerate(rows.items()):
        figure.add_trace(_points(name, own, colours[index % len(colours)]))
    figure.update_layout(
        **layout("Kernel calls below the measured roofs", "operations per byte", "operations per second", 440)
    )
    figure.update_layout(hovermode="closest", showlegend=True, margin={"t": 96})
    figure.update_xaxes(type="log", gridcolor=GRID)
    figure.update_yaxes(type="log", gridcolor=GRID, exponentformat="SI")
    return figure


def _roof(words: str, dash: str, bandwidth: float, peak: float, low: float, high: float) -> go.Scatter:
    ridge = peak / bandwidth
    x = sorted({low, min(max(ridge, low), high), high})
    y = [min(peak, at * bandwidth) for at in x]
    return go.Scatter(
        x=x, y=y, name=words, mode="lines", line={"color": LIMIT, "width": 1.5, "dash": dash}, hoverinfo="skip"
    )


def _points(name: str, rows: Sequence[Mapping[str, Any]], colour: str) -> go.Scatter:
    shown = [row for row in rows if row["operations"] and row["bytes"]]
    return go.Scatter(
        x=[row["operations_per_byte"] for row in shown],
        y=[row["operations_per_s"] for row in shown],
        text=[row["op"] for row in shown],
        customdata=[(row["calls"], row["ms"], 100 * row["share_of_bound"]) for row in shown],
        name=name,
        mode="markers",
        marker={"color": colour, "size": 10, "opacity": 0.85},
        hovertemplate="%{text}<br>%{customdata[0]} calls of %{customdata[1]:.3f} ms, %{customdata[2]:.0f} % of the bound"
        "<extra></extra>",
    )
