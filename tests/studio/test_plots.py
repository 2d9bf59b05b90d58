"""Figures: transparent, right numbers, group edges where they belong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from studio import plots
from trdq_core.presets import QUANTIZED_ROLES


@pytest.mark.parametrize(
    "figure",
    [
        plots.empty("Nothing yet."),
        plots.latent_sqnr({"a": [1.0, 2.0]}, {}),
        plots.histograms([0.0, 1.0, 2.0], [3, 1], [2, 2], log_y=False, title="t"),
        plots.channel_timeline([10.0, 900.0], np.ones((2, 4)), [500.0], title="t"),
    ],
)
def test_figures_suit_light_and_dark(figure: object) -> None:
    layout = figure.layout  # type: ignore[attr-defined]
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert layout.font.color == plots.TEXT
    assert layout.height


def test_sqnr_has_one_line_a_recipe_and_counts_steps_from_one() -> None:
    figure = plots.latent_sqnr({"RTN": [40.0, None, 30.0], "TR-DQ": [46.0, 44.0, 43.0]}, {"RTN": plots.BASELINE})
    assert [trace.name for trace in figure.data] == ["RTN", "TR-DQ"]
    assert list(figure.data[0].x) == [1, 2, 3]
    assert figure.data[0].line.color == plots.BASELINE
    assert figure.layout.showlegend


def test_histograms_share_their_axes() -> None:
    figure = plots.histograms([-2.0, 0.0, 2.0], [10, 0], [5, 5], log_y=True, title="t")
    before, after = figure.data
    assert list(before.x) == list(after.x) == [-1.0, 1.0]
    assert np.isnan(before.y[1]), "an empty bin has no logarithm"
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.barmode == "overlay"


def test_timeline_is_drawn_by_rising_timestep_with_its_edges() -> None:
    absmax = np.array([[1.0, 10.0], [100.0, 1000.0]])
    figure = plots.channel_timeline([900.0, 100.0], absmax, [250.0, 500.0], title="t")
    heat = figure.data[0]
    assert list(heat.x) == [100.0, 900.0]
    assert np.allclose(np.asarray(heat.z), [[2.0, 0.0], [3.0, 1.0]])
    assert {shape.x0 for shape in figure.layout.shapes} == {250.0, 500.0}


def test_wide_layers_keep_their_largest_channels() -> None:
    absmax = np.ones((3, 5000))
    absmax[1, 4321] = 1000.0
    heat = plots.channel_timeline([1.0, 2.0, 3.0], absmax, [], title="t").data[0]
    z = np.asarray(heat.z)
    assert z.shape == (plots.MOST_CHANNELS, 3)
    assert z.max() == pytest.approx(3.0)
    row = int(z[:, 1].argmax())
    assert abs(heat.y[row] - 4321) < 5000 / plots.MOST_CHANNELS


def test_bars_keep_their_order_colour_and_room() -> None:
    bars = [
        (f"blocks.{block}.{role}", role, 10.0 ** -(block + 1)) for block in range(12) for role in ("self_q", "mlp_out")
    ]
    figure = plots.layer_bars(bars, title="W4A8", log_y=True)
    assert list(figure.layout.xaxis.categoryarray) == [name for name, _, _ in bars]
    assert {trace.name: trace.marker.color for trace in figure.data} == {
        role: plots.ROLE_COLOURS[role] for role in ("self_q", "mlp_out")
    }
    assert figure.layout.width == 90 + plots.BAR_PITCH * 24, "each name has its room; the page scrolls the chart"
    assert figure.layout.yaxis.type == "log"
    few = plots.layer_bars([("proj", "unheard-of", 0.0)], title="", log_y=True)
    assert few.layout.width is None
    assert few.data[0].y == (None,), "nothing has no logarithm"


# Sight with one kind of cone missing, on linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deuteranopia": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9690]]),
    "tritanopia": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
TELLABLE = 9.0  # CIE 1976 difference; about 2.3 is just noticed side by side


def linear(colour: str) -> np.ndarray:
    """Linear RGB of "#rrggbb"."""
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB under D65."""
    ratio = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    root = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def contrast(one: str, other: str) -> float:
    """WCAG contrast of two colours."""
    low, high = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_every_role_has_a_colour_that_shows_on_light_and_dark() -> None:
    assert set(plots.ROLE_COLOURS) >= {*QUANTIZED_ROLES, "skip", "uncalled"}
    for colour in plots.ROLE_COLOURS.values():
        assert min(contrast(colour, paper) for paper in ("#ffffff", "#161c22")) >= 1.5, colour


@pytest.mark.parametrize("sight", SIGHT)
def test_roles_that_stand_in_one_chart_are_told_apart_by_colour_or_hatching(sight: str) -> None:
    apart = ({"cross", "skip"}, {"fused"})  # no family of models has both
    for one, other in itertools.combinations(plots.ROLE_COLOURS, 2):
        kinds = {role.partition("_")[0] for role in (one, other)}
        if plots.role_pattern(one) != plots.role_pattern(other) or all(kinds & some for some in apart):
            continue
        both = [lab(SIGHT[sight] @ linear(plots.ROLE_COLOURS[role])) for role in (one, other)]
        assert np.linalg.norm(both[0] - both[1]) >= TELLABLE, (one, other)
