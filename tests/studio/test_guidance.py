"""The Guidance page's handlers, called as the page calls them, and what they draw."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html import unescape
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from studio import plots
from studio.components import controls as sidebar
from studio.components import heatmap, sharing
from studio.components.heatmap import Heatmap
from studio.context import Studio
from studio.pages import compare, guidance, runs
from studio.pages.guidance import _Handlers
from studio.pages.runs import _Handlers as RunHandlers
from studio.pages.runs import gallery_of
from studio.pages.sharing import CHOICES
from studio.pages.sharing import Handlers as SharingHandlers
from studio.services import pictures
from studio.services.form import AppliedPlan, Form
from studio.services.similarity import Choice
from tests.studio.fake_core import FakeCore
from trdq_core.errors import ModelError
from trdq_core.specs import SharingSpec

CHOICE = ("output_error", 0.15, 1, "threshold", 2, "spatial")
NONE = ("output_error", 0.15, 1, "none", 2, "spatial")


def visitor(name: str = "a") -> Any:
    return SimpleNamespace(session_hash=name)


def values(form: Form) -> list[Any]:
    return [getattr(form, name) for name in Form.names()]


# Widgets hold nothing of a visitor, and making them takes longest.
@pytest.fixture(scope="module")
def controls() -> sidebar.Controls:
    with gr.Blocks():
        return sidebar.build([("pocket-image", "pocket-image")])


@pytest.fixture(scope="module")
def page() -> guidance.GuidancePage:
    with gr.Blocks():
        return guidance.build(*compare.build_strip(), gr.BrowserState(None))


@pytest.fixture
def handlers(studio: Studio, page: guidance.GuidancePage) -> _Handlers:
    return _Handlers(studio, page)


@pytest.fixture
def use(studio: Studio, page: guidance.GuidancePage, controls: sidebar.Controls) -> SharingHandlers:
    return SharingHandlers(studio, page.use, controls)


@pytest.fixture
def short(form: Form) -> Form:
    return dataclasses.replace(form, steps=10)


@pytest.fixture
def run_id(handlers: _Handlers, short: Form) -> str:
    """A measurement made by the page."""
    last = list(handlers.measure(visitor(), 2, *values(short)))[-1]
    return str(last[handlers.page.stored].value)


def map_of(text: str) -> dict[str, Any]:
    """The numbers that a drawn heatmap holds."""
    found = re.search(r'data-map="([^"]*)"', text)
    assert found
    return dict(json.loads(unescape(found[1])))


def test_without_a_measurement_the_page_says_what_would_fill_it(handlers: _Handlers, page: Any) -> None:
    updates = handlers.show("pocket-image", None, *CHOICE)
    assert "No measurement of pocket-image yet" in updates[page.empty]
    assert not updates[page.similar.box].visible
    assert not updates[page.use.box].visible


def test_measuring_streams_progress_and_ends_with_the_drawing(
    handlers: _Handlers, page: Any, core: FakeCore, short: Form
) -> None:
    core.runs.pace = 0.01
    updates = list(handlers.measure(visitor(), 3, *values(short)))
    strips = [update[page.strip] for update in updates if page.strip in update]
    assert any("/ 30" in strip and "left in this stage" in strip for strip in strips)
    assert any('<span class="now">Attention</span>' in strip for strip in strips)
    last = updates[-1]
    assert "can be chosen again" in last[page.strip]
    assert last[page.similar.box].visible
    drawn = map_of(last[page.similar.blocks_map])
    assert (len(drawn["v"]), len(drawn["t"])) == (8, 10)
    assert "Means over 3 prompts: 8 blocks of 4 heads, 10 steps" in last[page.similar.about]
    assert core.runs.calls[-1].command == "attention"
    assert len(last[page.similar.lines].data) == 8


@pytest.mark.parametrize(
    ("change", "count", "said"), [({"guidance": 1}, 2, "one branch"), ({}, None, "prompts to measure on")]
)
def test_bad_input_is_refused_in_place_and_as_a_toast(
    handlers: _Handlers, page: Any, core: FakeCore, form: Form, change: dict[str, Any], count: Any, said: str
) -> None:
    handler = handlers.measure(visitor(), count, *values(dataclasses.replace(form, **change)))
    assert said in next(handler)[page.problem]
    with pytest.raises(gr.Error, match=said):
        next(handler)
    assert core.runs.calls == []


def test_cancel_stops_a_measurement(handlers: _Handlers, page: Any, core: FakeCore, form: Form) -> None:
    core.runs.pace = 0.02
    handler = handlers.measure(visitor(), 2, *values(form))
    while "/ 40" not in next(handler).get(page.strip, ""):
        pass
    handlers.cancel(visitor())
    last = list(handler)[-1]
    assert "Cancelled during attention" in last[page.strip]
    assert page.similar.box not in last
    assert handlers.studio.similarities.measurements("pocket-image") == []


def test_what_is_stored_is_drawn_again_without_measuring(
    handlers: _Handlers, page: Any, core: FakeCore, run_id: str
) -> None:
    calls = len(core.runs.calls)
    shown = handlers.show("pocket-image", None)
    assert shown[page.stored].value == run_id
    kept = handlers.show("pocket-image", run_id, "output_error", 0.2, 2, "threshold", 5)
    assert kept[page.similar.threshold].value == 0.2, "coming back to the page changes nothing"
    assert kept[page.similar.block].value == 5
    assert len(core.runs.calls) == calls


def test_the_slider_draws_the_plan_and_its_price_at_once(handlers: _Handlers, page: Any, run_id: str) -> None:
    similar = page.similar
    replan = handlers.plan_from("threshold")
    few, many = (replan(run_id, "output_error", limit, 1, "none", 2) for limit in (0.06, 0.25))
    for updates, blocks in ((few, "blocks 0 to 1"), (many, "blocks 0 to 5")):
        assert blocks in updates[similar.summary]
        assert updates[similar.source] == "threshold"
        shared = "".join(map_of(updates[similar.blocks_map])["s"])
        said = re.search(r"(\d+) of 80", updates[similar.summary])
        assert said and int(said[1]) == shared.count("1")
    assert "output error at most 0.06, one time group" in few[similar.summary]
    groups = replan(run_id, "output_error", 0.1, 2, "none", 2)
    assert groups[similar.summary].count("<li>") == 2
    assert "timesteps 500 to 1000" in groups[similar.summary]
    assert "tr-map-edge" in groups[similar.blocks_map]
    line = handlers.lines_from("threshold")(run_id, "output_error", 0.1, 2, "none", 2)
    assert [shape.y0 for shape in line.layout.shapes if shape.y0 == shape.y1] == [0.1]


def test_the_published_list_and_none_replace_the_threshold(handlers: _Handlers, page: Any, run_id: str) -> None:
    similar = page.similar
    published = handlers.plan_from("published")(run_id, *CHOICE)
    assert "the published list" in published[similar.summary]
    assert "blocks 0 to 1, 6 to 7" in published[similar.summary]
    none = handlers.plan_from("none")(run_id, *CHOICE)
    assert sharing.NOTHING in none[similar.summary]
    assert "tr-map-shared" not in none[similar.blocks_map]
    assert handlers.lines_from("none")(run_id, *CHOICE).layout.shapes == ()


def test_a_bad_value_gives_its_sentence_and_leaves_the_drawing(handlers: _Handlers, page: Any, run_id: str) -> None:
    updates = handlers.plan_from("threshold")(run_id, "output_error", None, 1, "threshold", 0)
    assert list(updates) == [page.note]
    assert "threshold: it is empty" in updates[page.note]
    assert "press Measure" in handlers.plan_from("none")("../../etc", *CHOICE)[page.note]
    assert "press Measure" in handlers.open(None, *CHOICE)[page.note]
    with pytest.raises(gr.Error, match="press Measure"):
        handlers.look("gone", *CHOICE)


def test_another_measure_has_its_own_units(handlers: _Handlers, page: Any, run_id: str) -> None:
    updates = handlers.open(run_id, "map_cosine", 0.15, 1, "published", 2)
    slider = updates[page.similar.threshold]
    assert 0.5 < slider.minimum < slider.value <= slider.maximum == 1.0
    assert "map cosine at least" in slider.label
    assert "map cosine at least" in updates[page.similar.summary]
    assert "<span>1</span>" in updates[page.similar.bar]


def test_a_click_on_a_cell_shows_the_heads_of_its_block(handlers: _Handlers, page: Any, run_id: str) -> None:
    similar = page.similar
    event = gr.EventData(None, {"row": 6, "column": 3})
    updates = handlers.look_at(event, run_id, *CHOICE)
    assert updates[similar.block] == 6
    assert "Heads of block 6" in updates[similar.heads_map]
    assert len(map_of(updates[similar.heads_map])["v"]) == 4
    view = handlers.studio.similarities.open(run_id)
    assert view is not None
    assert map_of(updates[similar.heads_map])["v"][3][9] == f"{view.heads['output_error'][9, 6, 3]:.4g}"
    for forged in ({"row": 99}, {"row": "x"}, {}, None):
        assert handlers.look_at(gr.EventData(None, forged), run_id, *CHOICE)[similar.block] == 7, "the least alike"


def test_apply_fills_the_sidebar_and_offers_file_and_command(
    handlers: _Handlers, use: SharingHandlers, page: Any, controls: Any, run_id: str, short: Form
) -> None:
    updates = use.apply(run_id, *CHOICE, *values(short))
    applied = updates[controls.applied]
    assert isinstance(applied, AppliedPlan) and applied.plan.blocks == ((0, 1, 2, 3),)
    assert updates[controls.share].value is True
    assert "4 blocks, output error ≤ 0.15" in updates[controls.share].label
    with open(updates[page.use.file].value["path"]) as file:
        assert SharingSpec.from_json(file.read()) == applied.plan
    command = updates[page.use.command].value
    assert "trdq_core attention --spec" in command and "--sharing plan.json" in command
    off = use.apply(run_id, *NONE, *values(short))
    assert off[controls.applied] is None
    assert off[controls.share].value is False and off[controls.share].interactive is False
    bad = use.apply(run_id, *CHOICE, *values(dataclasses.replace(short, guidance=1)))
    assert "nothing to share" in bad[page.use.applied]
    assert controls.applied not in bad


@pytest.mark.parametrize(("base", "title"), [("fp", "FP32"), ("chosen", "TR-DQ W4A8")])
def test_a_trial_shows_both_pictures_their_difference_and_times(
    handlers: _Handlers,
    use: SharingHandlers,
    page: Any,
    core: FakeCore,
    run_id: str,
    short: Form,
    base: str,
    title: str,
) -> None:
    core.runs.pace = 0.005
    updates = list(use.tried(visitor(), base, run_id, *CHOICE, *values(short)))
    view = page.use.trial
    assert sum(image in update for update in updates for image in view.images) > 4, "previews come while it denoises"
    last = updates[-1]
    assert f"{title} + sharing" in last[view.heads[1]]
    assert all(last[image] is not None for image in (*view.images, view.difference))
    run = handlers.studio.runs.open(last[page.use.saved])
    assert run is not None
    names = [recipe.name for recipe in run.spec.recipes][-2:]  # type: ignore[union-attr]
    psnr = pictures.psnr(*(run.picture(name, 0) for name in names))  # type: ignore[arg-type]
    assert f"without sharing: {psnr:.1f} dB" in last[view.numbers]
    assert "41.0 ms</td>" in last[view.numbers] and "40.2 ms to 44.1 ms" in last[view.numbers]
    assert "64 of 255" in last[view.scale]
    assert "16 of 255" in use.difference(run.id, 16)[1]
    assert use.difference("gone", 4)[0] is None
    if base == "fp":
        assert "0.93 of the time without; the spreads do not overlap" in last[view.numbers]


def test_a_trial_that_cannot_run_says_why(
    handlers: _Handlers, use: SharingHandlers, page: Any, run_id: str, short: Form
) -> None:
    calls = len(handlers.studio.core.runs.calls)
    for choice, form, said in (
        (NONE, short, "shares no block"),
        (CHOICE, dataclasses.replace(short, prompt=""), "it is empty"),
        (CHOICE, dataclasses.replace(short, model="/etc"), "the models here are"),
    ):
        handler = use.tried(visitor(), "fp", run_id, *choice, *values(form))
        assert said in next(handler)[page.use.trial.strip]
        with pytest.raises(gr.Error, match=said):
            list(handler)
    assert len(handlers.studio.core.runs.calls) == calls
    handlers.studio.core.runs.break_with = ModelError("model pocket-image: the weights hold NaN.")
    with pytest.raises(gr.Error, match="hold NaN"):
        list(use.tried(visitor(), "fp", run_id, *CHOICE, *values(short)))


def test_random_weights_are_measured_with_a_warning_and_not_tried(
    handlers: _Handlers, use: SharingHandlers, page: Any, core: FakeCore, run_id: str, short: Form,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    known = core.runs.models()
    monkeypatch.setattr(core.runs, "models", lambda: [known[0]._replace(kind="speed"), *known[1:]])
    assert "random weights" in handlers.open(run_id, *CHOICE)[page.note]
    handler = use.tried(visitor(), "fp", run_id, *CHOICE, *values(short))
    assert "it makes no pictures" in next(handler)[page.use.trial.strip]
    assert core.runs.calls[-1].command == "attention"


def test_a_comparison_with_the_plan_shows_the_pair(
    studio: Studio, handlers: _Handlers, use: SharingHandlers, controls: Any, run_id: str, short: Form
) -> None:
    applied = use.apply(run_id, *CHOICE, *values(short))[controls.applied]
    with gr.Blocks():
        page = compare.build(*compare.build_strip(), gr.BrowserState(None))
    form = dataclasses.replace(short, share=True, applied=applied)
    last = list(compare._Session(studio, page).compare(visitor(), *values(form)))[-1]
    heads = [last[column.head] for column in page.result.columns]
    for head, title in zip(heads, ("FP32", "TR-DQ W4A8<", "TR-DQ W4A8 + sharing"), strict=True):
        assert title in head
    assert last[page.result.floor].count("<tr>") == 7, "every recipe in numbers where there are more than columns"
    assert "attention is shared" in last[page.result.same]


def test_runs_of_the_page_are_readable_under_runs(
    studio: Studio, handlers: _Handlers, use: SharingHandlers, controls: Any, run_id: str, short: Form
) -> None:
    list(use.tried(visitor(), "fp", run_id, *CHOICE, *values(short)))
    with gr.Blocks():
        page = runs.build()
        opener = RunHandlers(studio, page, compare.build(*compare.build_strip(), gr.BrowserState(None)).result, controls,
                             gr.Tabs())  # fmt: skip
    trial, measurement = opener.rows()[1]
    opened = opener.open(SimpleNamespace(row_value=trial))  # type: ignore[arg-type]
    assert "FP32 + sharing" in opened[page.metrics]
    assert "attention sharing in 4 blocks" in opened[page.metrics]
    assert [caption for _, caption in gallery_of(studio.runs.open(opened[page.chosen]))] == [
        "FP32: red apple",
        "FP32 + sharing: red apple",
    ]
    loaded = opener.settings(opened[page.chosen])
    assert loaded[controls.share].value is True
    similarity = opener.open(SimpleNamespace(row_value=measurement))[page.metrics]  # type: ignore[arg-type]
    assert "relative output error 0." in similarity and "Guidance page" in similarity
    assert "ended before" not in similarity


def chart(**changes: Any) -> Heatmap:
    values = np.array([[0.0, 0.1, 0.4], [0.1, 0.2, 0.2]])  # (columns, rows)
    usual: dict[str, Any] = {
        "title": "t", "row": "block", "measure": "output error", "values": values, "gap": values, "widest": 0.4,
        "timesteps": np.array([100.0, 900.0]), "shared": values < 0.15, "edges": (500.0,), "chosen": 1,
    }  # fmt: skip
    return Heatmap(**{**usual, **changes})


def test_a_heatmap_holds_its_numbers_marks_and_borders() -> None:
    text = heatmap.heatmap(chart())
    assert map_of(text)["v"] == [["0", "0.1"], ["0.1", "0.2"], ["0.4", "0.2"]]
    assert map_of(text)["s"] == ["11", "10", "00"]
    assert text.count("tr-map-shared") == 2, "neighbours in a row share one box"
    assert "tr-map-edge" in text and "left:50.000%" in text
    assert "tr-map-edge" not in heatmap.heatmap(chart(edges=(50.0,))), "a border outside of the steps has no place"
    assert 'class="now"' in text
    assert "<img src=x" not in heatmap.heatmap(chart(title="<img src=x>", measure="<img src=x>", row="<img src=x>"))
    picture = re.search(r"base64,([^\"]+)", text)
    assert picture
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture[1]))).convert("L"), dtype=int)
    assert pixels.shape == (3, 2)
    assert pixels[2, 0] > pixels[1, 1] > pixels[1, 0] > pixels[0, 0], "lighter is further apart"


def test_the_colour_range_is_stated_in_the_units_of_the_measure() -> None:
    assert "from 0 to 0.4" in heatmap.colour_bar("output error", 0.4, cosine=False)
    assert "from 1 to 0.6" in heatmap.colour_bar("map cosine", 0.4, cosine=True)


def test_blocks_and_groups_in_words_and_tables(studio: Studio, handlers: _Handlers, run_id: str) -> None:
    said = [sharing.block_ranges(blocks) for blocks in ((), (3,), (0, 1, 2, 5), (7, 0))]
    assert said == ["none", "block 3", "blocks 0 to 2, 5", "blocks 0, 7"]
    view = studio.similarities.open(run_id)
    assert view is not None
    plan = studio.similarities.by_threshold(view, "output_error", 0.15, 2)
    table = sharing.group_table(view, plan, "output_error")
    assert table.count("●") - 1 == sum(len(blocks) for blocks in plan.spec.blocks)
    assert f"{view.blocks['output_error'][:, 7].max():.3f}" in table
    assert sharing.step_table(view, "output_error").count("<td") == 8 * 11


def test_lines_differ_by_more_than_colour_and_carry_the_threshold() -> None:
    values = np.linspace(0, 1, 12).reshape(4, 3)
    figure = plots.block_lines([1, 2, 3, 4], values, title="t", measure="m", threshold=0.3, edges=(2.5,))
    assert [trace.name for trace in figure.data] == ["block 0", "block 1", "block 2"]
    assert len({trace.line.dash for trace in figure.data}) == 3
    assert [float(shape.y0) for shape in figure.layout.shapes if shape.y0 == shape.y1] == [0.3]
    assert figure.layout.annotations[0].text == "threshold 0.3"


def test_psnr_of_pictures() -> None:
    grey, lighter = (Image.new("RGB", (8, 8), (value,) * 3) for value in (100, 110))
    assert pictures.psnr(grey, grey) == float("inf")
    assert pictures.psnr(grey, lighter) == pytest.approx(20 * np.log10(255 / 10))


def test_the_choice_matches_its_widgets(page: Any) -> None:
    assert len(page.similar.choice()) == len(dataclasses.fields(Choice)) == CHOICES
