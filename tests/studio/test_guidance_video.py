"""The Guidance page on a video model: spatial and temporal blocks apart, and plans of the spatial ones alone."""

from __future__ import annotations

import shutil
from typing import Any

import gradio as gr
import numpy as np
import pytest

from studio.components import controls as sidebar
from studio.context import Studio
from studio.pages import compare, guidance, runs
from studio.pages.guidance import _Handlers
from studio.pages.sharing import Handlers as SharingHandlers
from studio.services.form import AppliedPlan, Form
from studio.services.similarity import Choice, Similarities
from tests.studio.fake_core import FakeCore
from tests.studio.fake_sharing import BLOCKS, HEADS, TEMPORAL_BLOCKS
from tests.studio.test_guidance import map_of, values, visitor
from trdq_core.errors import CalibrationError, RecipeError

MOVING = Form(model="pocket-video", prompt="whale", steps=4, groups=2)
SPATIAL = ("output_error", 0.15, 1, "threshold", 2, "spatial")
TEMPORAL = (*SPATIAL[:-1], "temporal")


@pytest.fixture(scope="module")
def page() -> guidance.GuidancePage:
    with gr.Blocks():
        return guidance.build(*compare.build_strip(), gr.BrowserState(None))


@pytest.fixture
def handlers(studio: Studio, page: guidance.GuidancePage) -> _Handlers:
    return _Handlers(studio, page)


@pytest.fixture
def run_id(handlers: _Handlers) -> str:
    """A measurement of clips."""
    last = list(handlers.measure(visitor(), 1, *values(MOVING)))[-1]
    return str(last[handlers.page.stored].value)


def test_both_kinds_of_blocks_are_read_apart(studio: Studio, run_id: str) -> None:
    spatial = studio.similarities.open(run_id)
    assert spatial is not None and spatial.temporal is not None
    temporal = spatial.temporal
    assert (spatial.part, temporal.part) == ("spatial", "temporal")
    assert spatial.heads["output_error"].shape == (4, BLOCKS, HEADS)
    assert temporal.heads["output_error"].shape == (4, TEMPORAL_BLOCKS, HEADS)
    view, choice, plan = studio.similarities.asked(run_id, Choice(*TEMPORAL))
    assert view is temporal and choice.part == "temporal"
    assert not plan.shared.any() and not plan.spec.active, "plans share spatial attention only"
    assert np.array_equal(view.blocks["output_error"], temporal.blocks["output_error"])
    with pytest.raises(RecipeError, match="made from the spatial blocks; choose Spatial"):
        studio.similarities.to_apply(run_id, Choice(*TEMPORAL))
    assert studio.similarities.to_apply(run_id, Choice(*SPATIAL))[1].spec.active


def test_the_page_turns_to_the_temporal_blocks_and_back(handlers: _Handlers, page: Any, run_id: str) -> None:
    similar = page.similar
    spatial, temporal = (handlers.turn(run_id, *choice) for choice in (SPATIAL, TEMPORAL))
    for updates, blocks, seen in ((spatial, BLOCKS, True), (temporal, TEMPORAL_BLOCKS, False)):
        assert updates[similar.part].visible
        assert len(map_of(updates[similar.blocks_map])["v"]) == len(updates[similar.lines].data) == blocks
        assert len(updates[similar.block].choices) == blocks
        assert updates[similar.step_table].count("<tr>") == blocks + 1
        assert updates[similar.planning].visible == updates[page.use.box].visible == seen
        assert ("1" in "".join(map_of(updates[similar.blocks_map])["s"])) == seen
        assert updates[similar.threshold].value == 0.15, "the threshold stays for the way back"
    assert (spatial[similar.part].value, temporal[similar.part].value) == ("spatial", "temporal")
    assert spatial[page.note] == ""
    assert "only looked at: a plan shares the spatial ones" in temporal[page.note]
    assert "64 tokens in each of 16 frames" in spatial[similar.about]
    assert "16 frames at each of 64 patches" in temporal[similar.about]
    assert temporal[similar.summary] == temporal[similar.group_table] == ""
    assert "shared by the plan" in spatial[similar.bar] and "shared by the plan" not in temporal[similar.bar]
    assert handlers.look(run_id, *TEMPORAL)[similar.block] == 2
    clicked = handlers.look_at(gr.EventData(None, {"row": 5}), run_id, *TEMPORAL)
    assert clicked[similar.block] == 5
    assert len(map_of(clicked[similar.blocks_map])["v"]) == TEMPORAL_BLOCKS


def test_a_measure_chosen_at_the_temporal_blocks_fits_the_slider_to_the_spatial_ones(
    handlers: _Handlers, page: Any, run_id: str
) -> None:
    similar = page.similar
    there, here = (handlers.open(run_id, "map_cosine", *choice[1:]) for choice in (TEMPORAL, SPATIAL))
    for name in ("value", "minimum", "maximum", "step", "label"):
        assert getattr(there[similar.threshold], name) == getattr(here[similar.threshold], name)
    assert there[similar.part].value == "temporal"


def test_nothing_is_applied_or_tried_from_the_temporal_blocks(
    studio: Studio, page: Any, core: FakeCore, run_id: str
) -> None:
    with gr.Blocks():
        controls = sidebar.build([("pocket-video", "pocket-video")])
    use, calls = SharingHandlers(studio, page.use, controls), len(core.runs.calls)
    refused = use.apply(run_id, *TEMPORAL, *values(MOVING))
    assert "choose Spatial" in refused[page.use.applied] and controls.applied not in refused
    with pytest.raises(gr.Error, match="choose Spatial"):
        list(use.tried(visitor(), "fp", run_id, *TEMPORAL, *values(MOVING)))
    assert len(core.runs.calls) == calls
    assert isinstance(use.apply(run_id, *SPATIAL, *values(MOVING))[controls.applied], AppliedPlan)


def test_older_measurements_of_clips_open_and_say_what_they_lack(
    studio: Studio, page: guidance.GuidancePage, run_id: str
) -> None:
    folder = next(info.folder for info in studio.core.runs.list_runs() if info.id == run_id)
    shutil.rmtree(folder / "temporal")
    again = _Handlers(studio, page)
    studio.similarities._open.clear()
    for choice in (SPATIAL, TEMPORAL):
        updates = again.turn(run_id, *choice)
        assert not updates[page.similar.part].visible and updates[page.similar.part].value == "spatial"
        assert updates[page.use.box].visible
        assert "no temporal blocks" in updates[page.note] and "press Measure" in updates[page.note]
    (folder / "temporal").mkdir()
    with pytest.raises(CalibrationError, match="measure it again"):
        Similarities(studio.core).open(run_id)


def test_pictures_have_no_choice_of_blocks(handlers: _Handlers, page: Any, form: Form, run_id: str) -> None:
    still = list(handlers.measure(visitor(), 1, *values(form)))[-1]
    assert not still[page.similar.part].visible
    assert still[page.note] == ""
    assert "64 tokens; measured" in still[page.similar.about]
    forged = handlers.turn(still[page.stored].value, *TEMPORAL)
    assert forged[page.similar.part].value == "spatial" and forged[page.similar.planning].visible


def test_the_runs_page_names_both(studio: Studio, run_id: str) -> None:
    run = studio.runs.open(run_id)
    assert run is not None
    found = run.report["similarity"]
    said = runs.metrics_table(run)
    assert f"relative output error {found['output_error']:.3f}" in said
    assert f"across frames {found['temporal']['output_error']:.3f}" in said
