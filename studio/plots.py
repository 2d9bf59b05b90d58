"""Figures for the pages: transparent, readable on light and on dark."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

TEXT = "#828c97"
GRID = "rgba(128,128,128,.22)"
REFERENCE, BASELINE, CHOSEN = "#7d8793", "#d97706", "#0d9488"
COLUMN_COLOURS = (REFERENCE, BASELINE, CHOSEN)
BEFORE, AFTER = "#d97706", "#0d9488"
OTHERS = ("#7c6cd6", "#2f8fd0", "#c2558f")  # recipes without a column
LIMIT = "#e05a1f"
# One hue for each part of a block, its layers from dark to light.
ROLE_COLOURS = {
    "self_q": "#0e7c72", "self_k": "#12a596", "self_v": "#4bbfb2", "self_out": "#93dcd3",
    "cross_q": "#a85d08", "cross_k": "#cc7a14", "cross_v": "#e09a3e", "cross_out": "#f0c78c",
    "mlp_in": "#6f5fd0", "mlp_out": "#9b8ee6",
    "fused_in": "#a3143c", "fused_out": "#ef6f6c", "skip": "#6e4b2a", "uncalled": "#a5adb5",
    "temporal_q": "#84305a", "temporal_k": "#a8487a", "temporal_v": "#c9719d", "temporal_out": "#e2a5c3",
    "temporal_mlp_in": "#1f6aa5", "temporal_mlp_out": "#6aaede",
    "text_q": "#7a6a00", "text_k": "#978400", "text_v": "#b5a11a", "text_out": "#d3c458",
    "text_mlp_in": "#2a5fa8", "text_mlp_out": "#7fa8e0",
}  # fmt: skip
# There are more parts than hues that everybody can tell apart, so time and text are also hatched.
ROLE_PATTERNS = {"temporal": "/", "text": ".", "uncalled": "x"}
BAR_PITCH = 14  # px between the layers of a bar chart
FEW_BARS = 18  # that many fit on any screen
DASHES = ("solid", "dash", "dot", "dashdot")
FONT = "IBM Plex Sans, ui-sans-serif, system-ui, sans-serif"
MOST_CHANNELS = 768  # rows of a heatmap; more are merged by their largest value


def layout(title: str, x: str, y: str, height: int) -> dict[str, Any]:
    """What all figures look like: transparent, the title at the left, the legend above."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True}
    return {
        "title": {"text": title, "font": {"size": 14}, "x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top"},
        "font": {"color": TEXT, "family": FONT, "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 64, "b": 44},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "xaxis": {"title": {"text": x}, **axis},
        "yaxis": {"title": {"text": y}, **axis},
        "hovermode": "x unified",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": TEXT, "activecolor": CHOSEN},
    }


def empty(text: str, height: int = 320) -> go.Figure:
    """A figure with one sentence: shown at load, so that the page has plotly ready before the first result."""
    figure = go.Figure()
    figure.update_layout(**layout("", "", "", height))
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    wrapped = "<br>".join(_wrap(text, 44))
    figure.add_annotation(text=wrapped, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"size": 13})
    return figure


def latent_sqnr(
    series: Mapping[str, Sequence[float | None]], colours: Mapping[str, str], dashed: Collection[str] = ()
) -> go.Figure:
    """Signal to quantization noise of the latent after each sampler step, one line a recipe; some of them dashed."""
    figure = go.Figure()
    for name, values in series.items():
        figure.add_trace(
            go.Scatter(
                x=list(range(1, len(values) + 1)),
                y=list(values),
                name=name,
                mode="lines+markers",
                line={"color": colours.get(name, CHOSEN), "width": 2, "dash": "dash" if name in dashed else "solid"},
                marker={"size": 6},
                hovertemplate="%{y:.1f} dB",
            )
        )
    figure.update_layout(**layout("Latent SQNR against FP (higher is closer)", "sampler step", "dB", 340))
    figure.update_layout(showlegend=True)
    steps = max((len(values) for values in series.values()), default=1)
    few = steps <= 12
    figure.update_xaxes(tick0=1 if few else 0, dtick=1 if few else -(-steps // 50) * 5, range=[0.5, steps + 0.5])
    return figure


def histograms(edges: Any, before: Any, after: Any, *, log_y: bool, title: str) -> go.Figure:
    """Counts before and after the transform on the same axes."""
    edges = np.asarray(edges, dtype=np.float64)
    figure = go.Figure()
    for name, counts, colour in (("before", before, BEFORE), ("after rotation", after, AFTER)):
        heights = np.asarray(counts, dtype=np.float64)
        shown = np.where(heights > 0, heights, np.nan) if log_y else heights
        figure.add_trace(
            go.Bar(
                x=(edges[:-1] + edges[1:]) / 2,
                y=shown,
                width=np.diff(edges),
                name=name,
                marker={"color": colour, "line": {"width": 0}},
                opacity=0.55,
                hovertemplate="%{y:,.0f}",
            )
        )
    figure.update_layout(**layout(title, "value, in units of its RMS", "count", 380))
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_yaxes(type="log" if log_y else "linear", exponentformat="power" if log_y else "SI")
    return figure


def channel_timeline(timesteps: Any, absmax: Any, edges: Sequence[float], *, title: str) -> go.Figure:
    """Largest absolute value of each channel at each timestep, colour by its logarithm, group edges as lines."""
    times = np.asarray(timesteps, dtype=np.float64)
    values = _merge(np.asarray(absmax, dtype=np.float64))
    order = np.argsort(times)
    logs = np.log10(np.maximum(values[order].T, 1e-8))
    ticks = np.arange(np.floor(logs.min()), np.ceil(logs.max()) + 1) if logs.size else np.array([0.0])
    figure = go.Figure(
        go.Heatmap(
            x=times[order],
            y=np.arange(logs.shape[0]) * (absmax.shape[1] / max(1, logs.shape[0])),
            z=logs.astype(np.float32),
            customdata=np.power(10.0, logs).astype(np.float32),
            colorscale="Cividis",
            colorbar={
                "title": {"text": "absmax"},
                "tickvals": list(ticks),
                "ticktext": [_power(t) for t in ticks],
                "thickness": 12,
            },
            hovertemplate="timestep %{x:.0f}, channel %{y:.0f}: %{customdata:.3g}<extra></extra>",
        )
    )
    figure.update_layout(**layout(title, "timestep (sampling runs from right to left)", "channel", 420))
    figure.update_layout(hovermode="closest")
    for edge in edges:
        figure.add_vline(x=float(edge), line={"color": "#ffffff", "width": 3})
        figure.add_vline(x=float(edge), line={"color": "#d4380d", "width": 1.5, "dash": "dash"})
    return figure


def block_lines(
    timesteps: Any, values: Any, *, title: str, measure: str, threshold: float | None, edges: Sequence[float]
) -> go.Figure:
    """One line a block over the timesteps, `values` (timesteps, blocks); the plan's threshold and group edges as lines."""
    figure = go.Figure()
    count = values.shape[1]
    for block in range(count):
        figure.add_trace(
            go.Scatter(
                x=np.asarray(timesteps),
                y=np.asarray(values[:, block], dtype=np.float64).round(6),
                name=f"block {block}",
                mode="lines+markers",
                line={
                    "color": f"hsl({360 * block / count:.0f}, 55%, 50%)",
                    "width": 2,
                    "dash": DASHES[block % len(DASHES)],
                },
                marker={"size": 5, "symbol": block % len(DASHES)},
                hovertemplate=f"block {block}, timestep %{{x:.0f}}: %{{y:.3f}}<extra></extra>",
            )
        )
    figure.update_layout(**layout(title, "timestep (sampling runs from right to left)", measure, 430))
    figure.update_layout(
        showlegend=True, hovermode="closest", legend={"y": -0.2, "yanchor": "top"}, margin={"t": 44, "b": 20}
    )
    for edge in edges:
        figure.add_vline(x=float(edge), line={"color": TEXT, "width": 1, "dash": "dot"})
    if threshold is not None:
        figure.add_hline(
            y=float(threshold), line={"color": LIMIT, "width": 2, "dash": "dash"},
            annotation={"text": f"threshold {threshold:g}", "font": {"color": LIMIT, "size": 12}},
            annotation_position="top left",
        )  # fmt: skip
    return figure


def role_pattern(role: str) -> str:
    """How bars of a role are hatched, in plotly's words; empty for plain ones."""
    return ROLE_PATTERNS.get(role.partition("_")[0], "")


def layer_bars(bars: Sequence[tuple[str, str, float]], *, title: str, log_y: bool) -> go.Figure:
    """One bar a layer, (name, role, value) in the order given, in the colour of its role; wide enough to read the names."""
    figure = go.Figure()
    for role in dict.fromkeys(role for _, role, _ in bars):
        own = [(name, value) for name, of, value in bars if of == role]
        figure.add_trace(
            go.Bar(
                x=[name for name, _ in own],
                y=[value if value > 0 or not log_y else None for _, value in own],
                name=role,
                marker={
                    "color": ROLE_COLOURS.get(role, REFERENCE),
                    "line": {"width": 0},
                    "pattern": {"shape": role_pattern(role), "size": 5, "solidity": 0.25},
                },
                hovertemplate=f"%{{x}} ({role}): %{{y:.3g}}<extra></extra>",
            )
        )
    figure.update_layout(**layout(title, "", "squared error / squared output", 460))
    figure.update_layout(
        barmode="stack", bargap=0.2, hovermode="closest", showlegend=True, margin={"t": 96, "b": 20, "r": 8},
        legend={"traceorder": "normal"},
    )  # fmt: skip
    if len(bars) > FEW_BARS:  # wider than a phone: the page scrolls the chart, not itself
        figure.update_layout(autosize=False, width=90 + BAR_PITCH * len(bars))
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=[name for name, _, _ in bars], tickangle=-90, tickfont={"size": 10},
        tickmode="array", tickvals=[name for name, _, _ in bars],
    )  # fmt: skip
    figure.update_yaxes(type="log" if log_y else "linear", exponentformat="power")
    return figure


def _merge(absmax: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(timesteps, channels) with at most MOST_CHANNELS columns; neighbours are merged by their largest value."""
    channels = absmax.shape[1]
    if channels <= MOST_CHANNELS:
        return absmax
    starts = np.linspace(0, channels, MOST_CHANNELS, endpoint=False).astype(int)
    return np.maximum.reduceat(absmax, starts, axis=1)


def _power(exponent: float) -> str:
    return f"{10**exponent:g}"


def _wrap(text: str, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]
