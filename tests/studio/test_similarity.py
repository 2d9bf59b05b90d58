"""Stored measurements and the plans made from them; the fake core plans by the rules of docs/interfaces.md."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from studio.context import Studio
from studio.services import similarity
from studio.services.form import Form
from studio.services.sharing import attention_spec
from studio.services.similarity import SimilarityView
from studio.services.work import run_work
from tests.studio.fake_sharing import BLOCKS, HEADS
from trdq_core.errors import CalibrationError, RecipeError


def measured(studio: Studio, form: Form) -> SimilarityView:
    """A stored measurement of ten steps, opened."""
    spec = attention_spec(dataclasses.replace(form, steps=10), 2)
    folder = run_work(studio.core, spec)(lambda event: None, lambda: False)
    view = studio.similarities.open(folder.name)
    assert view is not None
    return view


@pytest.fixture
def view(studio: Studio, form: Form) -> SimilarityView:
    return measured(studio, form)


def test_measurements_are_listed_by_model_newest_first(studio: Studio, form: Form, view: SimilarityView) -> None:
    newer = measured(studio, dataclasses.replace(form, seed=3))
    found = studio.similarities.measurements("pocket-image")
    assert [entry.id for entry in found] == [newer.id, view.id]
    assert "2 prompts · 10 steps · guidance 3.5 · seed 3" in found[0].title
    assert studio.similarities.measurements("random-dit") == []


def test_a_damaged_measurement_is_left_out_of_the_list_and_says_so_when_opened(
    studio: Studio, view: SimilarityView, form: Form
) -> None:
    other = measured(studio, form)
    folders = {info.id: info.folder for info in studio.core.runs.list_runs()}
    (folders[view.id] / "similarity.json").write_text("{")
    assert [entry.id for entry in studio.similarities.measurements("pocket-image")] == [other.id]
    fresh = similarity.Similarities(studio.core)
    with pytest.raises(CalibrationError, match="damaged"):
        fresh.open(view.id)
    (folders[other.id] / "similarity.safetensors").unlink()
    assert fresh.open(other.id) is None
    assert studio.similarities.measurements("pocket-image") == []


@pytest.mark.parametrize("run_id", ["..", "/etc", "", None, "nobody"])
def test_measurements_open_by_listed_ids_only(studio: Studio, view: SimilarityView, run_id: str | None) -> None:
    assert studio.similarities.open(run_id) is None


def test_numbers_that_fit_no_measurement_are_damage(studio: Studio, view: SimilarityView) -> None:
    folder = next(info.folder for info in studio.core.runs.list_runs())
    about = json.loads((folder / "similarity.json").read_text())
    (folder / "similarity.json").write_text(json.dumps({**about, "timesteps": []}))
    with pytest.raises(CalibrationError, match="measure it again"):
        similarity.Similarities(studio.core).open(view.id)


def test_time_runs_to_the_right_and_shapes_agree(view: SimilarityView) -> None:
    assert (np.diff(view.timesteps) > 0).all()
    assert view.blocks["output_error"].shape == (10, BLOCKS)
    assert view.heads["map_cosine"].shape == (10, BLOCKS, HEADS)
    assert view.blocks["output_error"][-1, -1] == view.blocks["output_error"].max(), "errors grow with the timestep"
    assert np.allclose(view.blocks["map_cosine"], view.heads["map_cosine"].mean(-1))
    assert view.largest_saving == pytest.approx(0.25)


@pytest.mark.parametrize("measure", ["output_error", "map_cosine"])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_plan_shares_what_keeps_to_the_threshold_in_the_whole_group(
    studio: Studio, view: SimilarityView, measure: Any, groups: int
) -> None:
    values = view.blocks[measure]
    threshold = float(np.quantile(values, 0.5))
    plan = studio.similarities.by_threshold(view, measure, threshold, groups)
    limit = round(threshold, 6)
    for group in range(groups):
        rows = plan.groups == group
        kept = values[rows] <= limit if measure == "output_error" else values[rows] >= limit
        assert (plan.shared[rows] == kept.all(0)).all()
    assert 0 < plan.shared.sum() < plan.shared.size
    assert plan.spec.predicted_saving == pytest.approx(0.25 * plan.shared.mean())
    errors = view.blocks["output_error"][plan.shared]
    assert (plan.spec.predicted_error, plan.spec.worst_error) == pytest.approx((errors.mean(), errors.max()))
    assert len(plan.labels) == groups


def test_more_groups_share_at_least_as_much(studio: Studio, view: SimilarityView) -> None:
    shared = [studio.similarities.by_threshold(view, "output_error", 0.15, count).shared.sum() for count in (1, 2, 10)]
    assert shared[0] < shared[1] < shared[2]


def test_the_published_list_and_none(studio: Studio, view: SimilarityView) -> None:
    published, none = studio.similarities.published(view), studio.similarities.none(view)
    assert published.spec.blocks == ((0, 1, 6, 7),), "8 and 6 of 28 blocks, scaled to 8"
    assert published.spec.worst_error == pytest.approx(view.blocks["output_error"][:, 7].max())
    assert "published list" in published.said
    assert not none.shared.any()
    assert none.spec.predicted_saving == 0
    assert not none.spec.active


@pytest.mark.parametrize(
    ("measure", "threshold", "groups", "said"),
    [
        ("output_error", None, 1, "threshold: it is empty"),
        ("output_error", -1, 1, "threshold: got -1"),
        ("output_error", float("nan"), 1, "not a number"),
        ("output_error", 0.1, 2.5, "time groups: got 2.5"),
        ("output_error", 0.1, 11, "at most as many groups as steps"),
        ("distance", 0.1, 1, "allowed are map_cosine, output_error"),
    ],
)
def test_bad_values_get_one_sentence(
    studio: Studio, view: SimilarityView, measure: Any, threshold: Any, groups: Any, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        studio.similarities.by_threshold(view, measure, threshold, groups)


@pytest.mark.parametrize("measure", ["output_error", "map_cosine"])
def test_the_slider_goes_from_nothing_to_everything_and_starts_at_a_quarter(
    studio: Studio, view: SimilarityView, measure: Any
) -> None:
    span = similarity.slider_range(view, measure)
    strict, loose = (span.least, span.most) if measure == "output_error" else (span.most, span.least)
    assert span.least <= span.start <= span.most
    assert studio.similarities.by_threshold(view, measure, loose, 1).shared.all()
    assert studio.similarities.by_threshold(view, measure, strict, 1).shared.sum() <= 10, "block 0 alone has no error"
    assert studio.similarities.by_threshold(view, measure, span.start, 1).shared[0].sum() == BLOCKS // 4
