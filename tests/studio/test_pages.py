"""The handlers, called as the page calls them; and the page as a whole, without a browser."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from studio import app
from studio.components import controls as sidebar
from studio.components import result
from studio.context import Studio
from studio.jobs import UNEXPECTED
from studio.pages import activations, compare, runs
from studio.pages.activations import _Handlers as ActivationHandlers
from studio.pages.compare import _Session
from studio.pages.runs import _Handlers as RunHandlers
from studio.services.form import Form
from tests.studio.fake_core import FakeCore
from trdq_core.arguments import build_parser
from trdq_core.errors import ModelError

PUBLIC = {"/list_models", "/list_runs", "/plan", "/compare"}


def visitor(name: str = "a") -> Any:
    return SimpleNamespace(session_hash=name)


def values(form: Form) -> list[Any]:
    return [getattr(form, name) for name in Form.names()]


@pytest.fixture
def page(studio: Studio) -> compare.ComparePage:
    with gr.Blocks():
        return compare.build(*compare.build_strip(), gr.BrowserState(None))


@pytest.fixture
def session(studio: Studio, page: compare.ComparePage) -> _Session:
    return _Session(studio, page)


def test_a_comparison_streams_previews_and_ends_with_the_stored_run(
    session: _Session, page: compare.ComparePage, core: FakeCore, form: Form
) -> None:
    core.runs.pace = 0.01
    updates = list(session.compare(visitor(), *values(form)))
    pictures = sum(column.image in update for update in updates for column in page.result.columns)
    assert pictures > 6, "previews come while it denoises"
    last = updates[-1]
    assert last[page.result.run_id] == last[page.saved] == session.studio.runs.rows()[0].id
    assert "Finished in" in last[page.strip]
    assert [last[c.image].value is not None for c in page.result.columns] == [True] * 3
    assert "FP32" in last[page.result.columns[0].head]
    assert "bit for bit" in last[page.result.floor]
    assert last[page.result.command].startswith("python -m trdq_core compare --spec")


def test_fewer_recipes_leave_columns_out(session: _Session, page: compare.ComparePage, form: Form) -> None:
    list(session.compare(visitor(), *values(dataclasses.replace(form, steps=4))))
    run = session.studio.runs.newest()
    assert run is not None
    del run.report["recipes"]["rtn-w4a8"]
    updates = result.stored(page.result, run)
    assert updates[page.result.pictures].visible
    for facts in run.recipes.values():
        facts["images"] = []
    timing = result.stored(page.result, run)
    assert not timing[page.result.pictures].visible
    assert "says nothing about quality" in timing[page.result.same]
    assert [updates[column.box].visible for column in page.result.columns] == [True, True, False]
    assert result.column_names(list("abcde")) == ["a", "b", "e"]


def test_bad_input_is_refused_in_place_and_as_a_toast(
    session: _Session, page: compare.ComparePage, core: FakeCore, form: Form
) -> None:
    handler = session.compare(visitor(), *values(dataclasses.replace(form, prompt="")))
    assert "it is empty" in next(handler)[page.problem]
    with pytest.raises(gr.Error, match="it is empty"):
        next(handler)
    assert core.runs.calls == []


@pytest.mark.parametrize(
    ("error", "text"),
    [(ModelError("model pocket-image: the weights hold NaN."), "the weights hold NaN"), (ValueError("x"), UNEXPECTED)],
)
def test_a_failed_run_says_why_and_nothing_more(
    session: _Session, page: compare.ComparePage, core: FakeCore, form: Form, error: Exception, text: str
) -> None:
    core.runs.break_with = error
    updates: list[Any] = []
    with pytest.raises(gr.Error, match=text[:30]):
        updates.extend(session.compare(visitor(), *values(form)))


def test_cancel_keeps_the_columns_and_says_so(
    session: _Session, page: compare.ComparePage, core: FakeCore, form: Form
) -> None:
    core.runs.pace = 0.02
    handler = session.compare(visitor(), *values(form))
    next(handler)
    while not session.studio.worker.length() or "sampl" not in str(next(handler)[page.strip]):
        pass
    session.cancel(visitor())
    last = list(handler)[-1]
    assert "is kept" in last[page.strip]
    assert session.studio.runs.rows()[0].state == "cancelled"


def test_a_second_visitor_is_told_his_place(
    session: _Session, page: compare.ComparePage, core: FakeCore, form: Form
) -> None:
    core.runs.pace = 0.01
    first, second = (session.compare(visitor(name), *values(form)) for name in "ab")
    next(first)
    next(first)
    assert "You are number 1 in line" in next(second)[page.strip]
    first.close()
    second.close()


def test_calibrating_reports_layers_and_stores(
    session: _Session, page: compare.ComparePage, core: FakeCore, form: Form
) -> None:
    core.runs.pace = 0.01
    updates = list(session.calibrate(visitor(), *values(form)))
    assert any("transformer_blocks." in update[page.strip] for update in updates)
    assert "stored and will be used again" in updates[-1][page.strip]
    totals, table, prices, problem = session.plan(*values(form))
    assert "will be used again" in totals
    assert "blocks.0.attn1.to_q" in table
    assert "will be used" in table
    assert "switched" in prices
    assert problem == ""


def test_plan_shows_the_sentence_instead_of_a_plan(session: _Session, form: Form) -> None:
    *_, problem = session.plan(*values(dataclasses.replace(form, groups=40)))
    assert "use at most as many groups as steps" in problem


def test_activations_are_honest_when_empty_and_draw_when_not(studio: Studio, session: _Session, form: Form) -> None:
    with gr.Blocks():
        page = activations.build()
    handlers = ActivationHandlers(studio, page)
    (empty,) = handlers.draw(visitor(), None, None, None, None, True, *values(form))
    assert "No calibration yet for pocket-image" in empty[page.empty]
    list(session.calibrate(visitor(), *values(form)))
    updates = list(handlers.draw(visitor(), "forged", "forged", "forged", 99, True, *values(form)))
    assert updates[0][page.group].value == 0
    assert len(updates[0][page.group].choices) == 4
    assert len(updates[0][page.timeline].layout.shapes) == 6, "three edges, each a line on a lighter one"
    line = updates[0][page.command].value
    assert line.startswith(
        "python -m trdq_core activations --model pocket-image --recipe tr-dq-w4a8 --groups 4 --storage"
    )
    assert build_parser().parse_args(shlex.split(line)[3:]).group == 0, "the command line takes what is shown"
    assert not empty[page.command].visible
    last = updates[-1]
    assert [trace.name for trace in last[page.histogram].data] == ["before", "after rotation"]
    for said in ("absmax", "kurtosis", "clipped share", "256 rows"):
        assert said in last[page.facts]
    assert not updates[0][page.part].visible, "a model of pictures has one kind of blocks"


def test_spatial_and_temporal_layers_are_looked_at_apart(studio: Studio, session: _Session, form: Form) -> None:
    with gr.Blocks():
        page = activations.build()
    handlers, moving = ActivationHandlers(studio, page), dataclasses.replace(form, model="pocket-video", prompt="whale")
    list(session.calibrate(visitor(), *values(moving)))
    for part, prefix in (("spatial", "transformer_blocks."), ("temporal", "temporal_transformer_blocks.")):
        update = next(iter(handlers.draw(visitor(), None, part, "forged", 0, True, *values(moving))))
        names = [name for _, name in update[page.layer].choices]
        assert update[page.part].visible
        assert names and all(name.startswith(prefix) for name in names)
        assert update[page.layer].value == names[0]


def test_runs_are_listed_opened_and_their_settings_loaded(studio: Studio, session: _Session, form: Form) -> None:
    with gr.Blocks():
        page = runs.build()
        controls = sidebar.build([("pocket-image", "pocket-image")])
        tabs = gr.Tabs()
    handlers = RunHandlers(studio, page, session.page.result, controls, tabs)
    assert "No runs yet" in handlers.rows()[0]
    list(session.compare(visitor(), *values(dataclasses.replace(form, seed=5, steps=6))))
    rows = handlers.rows()[1]
    opened = handlers.open(SimpleNamespace(row_value=rows[0]))  # type: ignore[arg-type]
    assert len(opened[page.gallery].value) == 3
    assert "31.0 dB" in opened[page.metrics]
    run_id = opened[page.chosen]
    assert handlers.show(run_id)[session.page.result.run_id] == run_id
    loaded = handlers.settings(run_id)
    assert (loaded[controls.seed], loaded[controls.steps]) == (5, 6)
    with pytest.raises(gr.Error, match="not there any more"):
        handlers.open(SimpleNamespace(row_value=["../../etc"]))  # type: ignore[arg-type]


def test_only_named_endpoints_are_public(core: FakeCore) -> None:
    demo = app.build(core)
    assert set(demo.get_api_info()["named_endpoints"]) == PUBLIC
    assert not demo.get_api_info()["unnamed_endpoints"]


def test_whoever_follows_a_state_is_told(core: FakeCore) -> None:
    """Gradio wakes those who follow a gr.State after a queued answer only; and only the queue carries several answers."""
    demo = app.build(core)
    followed = {target for fn in demo.fns.values() for target, event in fn.targets if event == "change"}
    states = {block._id for block in demo.blocks.values() if isinstance(block, gr.State)} & followed
    assert states
    for fn in demo.fns.values():
        if fn.queue is False:
            assert not fn.types_generator, fn.name
            assert not {block._id for block in fn.outputs} & states, fn.name


def test_pages_are_there_before_they_are_opened(core: FakeCore) -> None:
    """What a handler of the tab answers would meet widgets that are still being made, and gradio loses part of it."""
    demo = app.build(core)
    tabs = [block for block in demo.blocks.values() if isinstance(block, gr.Tab)]
    assert len(tabs) == 6
    assert all(tab.render_children for tab in tabs if tab.id != "compare")


def test_launch_keeps_to_itself(core: FakeCore) -> None:
    options = app.launch_options()
    assert options["run_history"] is False
    assert options["ssr_mode"] is False
    assert "share" not in options
    assert "show_error" not in options, "unforeseen errors stay in the log"
    assert app.build(core).analytics_enabled is False


def test_the_page_is_built_without_torch(root: Any) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, '.'); from tests.studio.fake_core import FakeCore;"
        "from studio.app import build; build(FakeCore(pathlib.Path('nowhere')));"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'something heavy was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_help_is_quick_and_says_the_flags(root: Any) -> None:
    done = subprocess.run([sys.executable, "app.py", "--help"], cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert {"--host", "--port", "--no-browser"} <= set(done.stdout.replace("\n", " ").split())
