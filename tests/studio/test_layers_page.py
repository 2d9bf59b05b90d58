"""The handlers of the Layers page, called as the page calls them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from studio.components import controls as sidebar
from studio.components import edited, sensitivity
from studio.components import methods as lines
from studio.context import Studio
from studio.pages import compare, layers, runs
from studio.pages.editing import Handlers
from studio.pages.layers import _Handlers
from studio.services import methods, scans
from studio.services.form import Form, form_of_spec
from tests.studio.fake_core import LAYERS, FakeCore
from trdq_core.errors import ModelError
from trdq_core.presets import make_recipe
from trdq_core.specs import Recipe

COUNT = len(LAYERS)
CHOICE = ("W4A8", "denoiser_error", "model", False)


def visitor() -> Any:
    return SimpleNamespace(session_hash="a")


def values(form: Form) -> list[Any]:
    return [getattr(form, name) for name in Form.names()]


@pytest.fixture
def made(studio: Studio) -> tuple[layers.LayersPage, sidebar.Controls, gr.Tabs]:
    with gr.Blocks():
        controls = sidebar.build([("pocket-image", "pocket-image")])
        page = layers.build(*compare.build_strip())
        return page, controls, gr.Tabs()


@pytest.fixture
def scanning(studio: Studio, made: Any) -> _Handlers:
    return _Handlers(studio, made[0])


@pytest.fixture
def plan(studio: Studio, made: Any) -> Handlers:
    page, controls, tabs = made
    return Handlers(studio, page.plan, controls, tabs)


def scan(handlers: _Handlers, form: Form) -> str:
    last = list(handlers.scan(visitor(), "rtn", ["W8A8", "W4A8"], 2, *values(form)))[-1]
    return str(last[handlers.page.stored].value)


def test_a_scan_reports_layers_and_ends_with_its_chart(scanning: _Handlers, core: FakeCore, form: Form) -> None:
    page = scanning.page
    empty = scanning.show("pocket-image", None, *CHOICE)
    assert "No scan of pocket-image yet" in empty[page.empty]
    core.runs.pace = 0.03
    updates = list(scanning.scan(visitor(), "rtn", ["W8A8", "W4A8"], 2, *values(form)))
    assert any("transformer_blocks." in str(update.get(page.strip)) for update in updates)
    assert any("left in this stage" in str(update.get(page.strip)) for update in updates)
    last = updates[-1]
    assert "Finished in" in last[page.strip]
    figure = last[page.result.chart]
    assert [trace.name for trace in figure.data] == ["self_q", "cross_q", "mlp_in"]
    assert sum(len(trace.x) for trace in figure.data) == COUNT
    assert figure.layout.xaxis.categoryarray[0] == "blocks.0.attn1.to_q"
    assert last[page.result.numbers].count("<tr>") == (1 + 3) + (1 + COUNT), "a table of roles, a table of layers"
    assert "sensitivity --spec" in last[page.result.command]


def test_sorting_and_the_scale_draw_again(scanning: _Handlers, form: Form) -> None:
    page, run = scanning.page, scan(scanning, form)
    model = scanning.draw(run, *CHOICE)[page.result.chart].layout
    largest = scanning.draw(run, "W4A8", "layer_error", "largest", True)[page.result.chart].layout
    assert (model.yaxis.type, largest.yaxis.type) == ("linear", "log")
    assert set(model.xaxis.categoryarray) == set(largest.xaxis.categoryarray)
    assert "own output" in largest.title.text
    assert "this scan has W8A8, W4A8" in scanning.draw(run, "W2A2", *CHOICE[1:])[page.note]
    assert "not there any more" in scanning.open("forged", *CHOICE)[page.note]


def test_bad_scans_are_refused_in_place_and_as_a_toast(scanning: _Handlers, core: FakeCore, form: Form) -> None:
    handler = scanning.scan(visitor(), "rtn", [], 2, *values(form))
    assert "at least one bit-width" in next(handler)[scanning.page.problem]
    with pytest.raises(gr.Error, match="at least one bit-width"):
        next(handler)
    assert core.runs.calls == []


def test_a_failed_scan_says_why(scanning: _Handlers, core: FakeCore, form: Form) -> None:
    core.runs.break_with = ModelError("model pocket-image: the weights hold NaN.")
    with pytest.raises(gr.Error, match="hold NaN"):
        list(scanning.scan(visitor(), "rtn", ["W8A8"], 2, *values(form)))


def test_the_plan_opens_changes_and_is_saved_as_a_method(
    scanning: _Handlers, plan: Handlers, studio: Studio, form: Form
) -> None:
    page, run = plan.page, scan(scanning, form)
    asked = values(dataclasses.replace(form, method="rtn", baseline="tr-dq"))
    first = plan.show(None, run, *asked)
    assert len(first[page.table]) == COUNT
    assert first[page.table][0][1:3] == ["4", "8"]
    edit = first[page.edit]
    clicked = plan.pick(SimpleNamespace(row_value=first[page.table][0]), edit, [])  # type: ignore[arg-type]
    assert clicked == [LAYERS[0]]
    assert plan.pick(SimpleNamespace(row_value=first[page.table][0]), edit, clicked) == []  # type: ignore[arg-type]
    skipped = plan.skip(edit, run, clicked, *asked)
    assert skipped[page.table][0][1:3] == ["skip", "skip"]
    assert "1 skipped" in skipped[page.totals] and skipped[page.totals] != first[page.totals]
    assert "save the recipe" in skipped[page.command]
    wider = plan.set_bits(skipped[page.edit], run, ["role:mlp_in"], 8, 8, *asked)
    assert wider[page.table][2][1] == "8"
    saved = plan.save(wider[page.edit], run, "my-plan", *asked)
    assert "Saved as my-plan:" in saved[page.saved]
    assert Recipe.from_json(Path(saved[page.file].value["path"]).read_text()).name == "my-plan"
    assert ("my-plan (saved recipe)", "saved:my-plan") in saved[plan.controls.method].choices
    assert ("my-plan (saved recipe)", "saved:my-plan") in saved[plan.controls.baseline].choices
    assert "--recipe-file" in saved[page.command] and "sensitivity --spec" in saved[page.command]
    assert "in place of the earlier one" in plan.save(wider[page.edit], run, "my-plan", *asked)[page.saved]
    used = plan.use("my-plan")
    assert used[plan.controls.method].value == "saved:my-plan"
    assert plan.tabs is not None and used[plan.tabs].selected == "compare"
    again = plan.start("saved:my-plan", run, *asked)
    assert [row[1:3] for row in again[page.table]] == [row[1:3] for row in wider[page.table]]
    back = plan.set_bits(again[page.edit], run, clicked, 4, 8, *asked)
    assert back[page.table][0][1:3] == ["4", "8"], "what a saved recipe skips can be quantized again"
    undone = plan.undo(wider[page.edit], run, [], *asked)
    assert undone[page.table] == first[page.table]


def test_a_budget_fills_the_table_and_shows_its_command(scanning: _Handlers, plan: Handlers, form: Form) -> None:
    page, run = plan.page, scan(scanning, form)
    found = plan.fit("0.2", run, *values(form))
    assert {row[1] for row in found[page.table]} == {"4", "8"}
    assert "budget --sensitivity" in found[page.command] and "--recipe-file plan.json" in found[page.command]
    assert "sum over the layers" in found[page.totals]
    for budget, sentence in (("", "it is empty"), ("12", "the smallest choice takes"), ("soon", "got &#x27;soon")):
        assert sentence in plan.fit(budget, run, *values(form))[page.note]
    assert "press Scan first" in plan.fit("0.2", None, *values(form))[page.note]


def test_bad_edits_say_one_sentence_and_leave_the_plan(plan: Handlers, form: Form) -> None:
    page, asked = plan.page, values(form)
    edit = plan.show(None, None, *asked)[page.edit]
    for updates, sentence in (
        (plan.skip(edit, None, [], *asked), "none is picked"),
        (plan.skip(None, None, ["*"], *asked), "there is none yet"),
        (plan.skip(edit, None, ["*"], *asked), "leave at least one"),
        (plan.set_bits(edit, None, ["*"], 7, 8, *asked), "weight bits: got 7"),
        (plan.start("saved:gone", None, *asked), "none called &#x27;gone"),
        (plan.show(None, None, *values(dataclasses.replace(form, groups="x"))), "groups: it is empty or not a number"),
    ):
        assert sentence in updates[page.note]
        assert page.table not in updates
    assert "small letters" in plan.save(edit, None, "Not a name", *asked)[page.saved]
    assert "none called" in plan.use("nobody")[page.saved]


def test_the_error_of_another_method_is_said_to_be_that(scanning: _Handlers, plan: Handlers, form: Form) -> None:
    run = scan(scanning, form)
    assert "a scan with RTN; this plan is of TR-DQ" in plan.show(None, run, *values(form))[plan.page.totals]
    beyond = values(dataclasses.replace(form, weight_bits=3))
    assert "lacks the bits of 9 layers" in plan.show(None, run, *beyond)[plan.page.totals]


def test_settings_of_a_run_choose_the_saved_recipe_again(studio: Studio, made: Any, form: Form) -> None:
    studio.recipes.save("mine", dataclasses.replace(make_recipe("rtn"), name="mine"))
    asked = dataclasses.replace(form, method="saved:mine", baseline="tr-dq", saved=studio.recipes.all(), steps=4)
    _, controls, tabs = made
    with gr.Blocks():
        page = compare.build(*compare.build_strip(), gr.BrowserState(None))
        listed = runs.build()
    list(compare._Session(studio, page).compare(visitor(), *values(asked)))
    handlers = runs._Handlers(studio, listed, page.result, controls, tabs)
    loaded = handlers.settings(studio.runs.rows()[0].id)
    assert (loaded[controls.method].value, loaded[controls.baseline].value) == ("saved:mine", "tr-dq")
    assert "my PLAN" not in str(loaded)


def test_the_list_marks_what_is_simulated_and_links_papers() -> None:
    table = lines.table(methods.all_facts(4, 8), "W4A8")
    assert table.count("<tr>") == len(methods.method_choices()) + 1
    assert 'href="https://arxiv.org/abs/2503.06564"' in table
    assert "learns rounding (minutes)" in table and "second pass" in table
    line = lines.line(methods.chosen_facts("tq-dit", 4, 8, ()))
    assert "Two-region grids" in line and "simulated" in line and "second calibration pass" in line
    assert lines.line(None) == ""
    evil = dataclasses.replace(make_recipe("rtn"), name="evil", description="<img src=x onerror=alert(1)>")
    assert "<img" not in lines.line(methods.facts_of_saved(evil))
    assert compare.methods_table(7, 8) == gr.skip()


def test_short_names_lead_back_to_their_layers(studio: Studio) -> None:
    view = studio.edits.view(studio.edits.start("pocket-image", make_recipe("rtn"), 20))
    assert [edited.layer_called(view, row[0]) for row in edited.rows(view)] == list(LAYERS)
    assert edited.layer_called(view, "nobody") is None


def test_a_scan_that_was_stopped_says_so(scanning: _Handlers, studio: Studio, form: Form) -> None:
    view = studio.scans.open(scan(scanning, form))
    about = {**view.table.about, "complete": False}
    table = dataclasses.replace(view.table, about=about)
    assert "bit-widths are missing" in sensitivity.about(view._replace(table=table))
    assert scans.when("20261121-081500-sensitivity-abcd") == "2026-11-21 08:15"


def test_the_runs_page_says_where_a_scan_is_drawn(scanning: _Handlers, studio: Studio, form: Form) -> None:
    run = studio.runs.open(scan(scanning, form))
    assert run is not None and run.spec is not None
    assert f"{COUNT} layers, each quantized alone to W8A8, W4A8" in runs.metrics_table(run)
    values_of = form_of_spec(run.spec)
    assert values_of["method"] == "rtn" and "baseline" not in values_of, "a method is not its own baseline"
