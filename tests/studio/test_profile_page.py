"""The Profile page: its figures, its tables, and what it says where there is nothing to show."""

from __future__ import annotations

import json

import gradio as gr
import pytest

from studio import profile_plots
from studio.components import profile as tables
from studio.context import Studio
from studio.pages import profile
from studio.pages.profile import ProfilePage, _Handlers
from tests.studio import fake_profile
from tests.studio.fake_core import FakeCore


@pytest.fixture
def page() -> ProfilePage:
    with gr.Blocks():
        return profile.build()


def test_bars_are_stacked_by_part() -> None:
    rows = fake_profile.report()["recipes"]
    figure = profile_plots.split_bars({name: rows[name]["split"] for name in ("fp", "tr-dq-w8a8")})
    assert len(figure.data) == len(profile_plots.PARTS)
    assert list(figure.data[0].y) == ["fp", "tr-dq-w8a8"]
    assert list(figure.data[1].x) == [2.0, 0.8]
    assert figure.layout.barmode == "stack"


def test_points_lie_below_roofs_that_bend_at_the_ridge() -> None:
    calls = fake_profile.report()["recipes"]["tr-dq-w8a8"]["roofline"]
    figure = profile_plots.roofline({"TR-DQ W8A8": calls}, fake_profile.PEAKS)
    integer, single, points = figure.data
    assert max(integer.y) == 9.5e11
    assert max(single.y) == 3.5e11
    ridge = 9.5e11 / 1.7e10
    assert any(x == pytest.approx(ridge) for x in integer.x)
    assert list(points.y) == [4e11, 4e11]
    without = profile_plots.roofline({"A": calls}, fake_profile.PEAKS | {"integer_operations_per_s": None})
    assert len(without.data) == 2


def test_tables_hold_every_number_and_escape_names() -> None:
    report = fake_profile.report()
    rows = {name: facts for name, facts in report["recipes"].items()}
    parts = tables.parts_table(report, rows)
    for words in ("12.5 ms", "400.0 ms", "3 of 0.20 ms", "512.0 MiB", "4.0 MiB"):
        assert words in parts
    calls = tables.calls_table({"TR-DQ": rows["tr-dq-w8a8"]["roofline"]})
    assert "linear &lt;W8&gt;" in calls
    assert "78 %" in calls
    assert tables.calls_table({}) == ""


def test_the_newest_profile_is_shown_and_the_chosen_one_kept(studio: Studio, core: FakeCore, page: ProfilePage) -> None:
    handlers = _Handlers(studio, page)
    assert "No profiles yet" in handlers.enter(None)[page.empty]
    old = fake_profile.store(core.runs.folder, "20261120-100000-profile-ab12")
    new = fake_profile.store(core.runs.folder)
    assert handlers.enter(None)[page.run].value == new
    assert handlers.enter(old)[page.run].value == old
    shown = handlers.show(new)
    assert "Simulated, so without times" in shown[page.note]
    assert "1.05 times as long" in shown[page.note]
    assert "attention float32" in shown[page.calls]
    with pytest.raises(gr.Error, match="not there any more"):
        handlers.show("gone")


def test_traces_can_be_fetched_and_made_again(studio: Studio, core: FakeCore, page: ProfilePage) -> None:
    """A link for each recipe that has one, none that leads out of the run's folder; the command has the flag."""
    run = fake_profile.store(core.runs.folder)
    shown = _Handlers(studio, page).show(run)
    assert shown[page.traces].count("<a href=") == 2
    assert 'download="tr-dq-w8a8.json.gz"' in shown[page.traces]
    assert "profile --spec" in shown[page.command].value
    assert shown[page.command].value.endswith("--trace trace.json")
    folder = core.runs.folder / "runs" / run
    report = fake_profile.report()
    report["recipes"]["fp"]["trace_file"] = "../outside.json.gz"
    (folder.parent / "outside.json.gz").write_bytes(b"")
    report["recipes"]["tr-dq-w8a8"]["trace_file"] = "traces/gone.json.gz"
    (folder / "report.json").write_text(json.dumps(report))
    assert _Handlers(studio, page).show(run)[page.traces] == ""


def test_profiles_of_older_versions_are_told(studio: Studio, core: FakeCore, page: ProfilePage) -> None:
    run = fake_profile.store(core.runs.folder)
    file = core.runs.folder / "runs" / run / "report.json"
    file.write_text('{"recipes": {"fp": {"kind": "reference", "label": "FP32"}}}')
    shown = _Handlers(studio, page).show(run)
    assert "run it again" in shown[page.note]
    assert shown[page.calls] == ""
