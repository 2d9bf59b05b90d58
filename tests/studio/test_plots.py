"""Figures: transparent, right numbers, group edges where they belong."""

from __future__ import annotations

import numpy as np
import pytest

from studio import plots


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
