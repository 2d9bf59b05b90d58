"""Learning the rounding of a tiny model: better than nearest or not kept, resumable, cancellable, clear about bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.reconstruction.conftest import ACTIVATION, QUICK, make_recipe
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.errors import CalibrationError, Cancelled
from trdq_core.events import Event
from trdq_core.reconstruction import run
from trdq_core.reconstruction.learning import betas
from trdq_core.reconstruction.run import Reconstruction, reconstruct
from trdq_core.specs import QuantSpec, ReconstructionSpec
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeGroups
from trdq_core.weights.rounding import dequantize_weight

Fit = Callable[..., list]


def same_weights(one: Reconstruction, other: Reconstruction) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(dequantize_weight(one.weights[name]), dequantize_weight(other.weights[name]))
        for name in one.weights
    )


@pytest.fixture(scope="module")
def learned(model: PixArtModel, statistics: Statistics, fit: Fit) -> Reconstruction:
    return reconstruct(model, fit(), make_recipe(), statistics)


def test_invariant_29_learned_units_err_less_on_held_out_items(learned: Reconstruction) -> None:
    assert [unit.unit for unit in learned.units] == ["transformer_blocks.0", "transformer_blocks.1"]
    for unit in learned.units:
        assert unit.kept and unit.error_learned < unit.error_nearest
        assert 0 < unit.moved < 0.5
        assert len(unit.layers) == 10


def test_invariant_29_weights_are_floor_or_ceiling(learned: Reconstruction, fit: Fit) -> None:
    for linear in fit():
        below, above = linear.grid.neighbours(linear.weight)
        got = dequantize_weight(learned.weights[linear.name])
        assert (torch.minimum((got - below).abs(), (got - above).abs()) < 1e-6).all()


def test_a_worse_rounding_is_not_kept(
    model: PixArtModel, statistics: Statistics, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_way(task: object, *args: object, **options: object) -> dict:
        return {name: ~choice for name, choice in task.nearest().items()}

    monkeypatch.setattr(run, "learn_rounding", wrong_way)
    result = reconstruct(model, fit(["self_q"]), make_recipe(), statistics)
    for unit, linear in zip(result.units, fit(["self_q"]), strict=True):
        assert not unit.kept and unit.error_learned >= unit.error_nearest and unit.moved == 0
        got = dequantize_weight(result.weights[linear.name])
        assert torch.allclose(got, linear.grid.nearest(linear.weight), atol=1e-6)


def test_layers_are_learned_one_by_one(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    result = reconstruct(model, fit(["mlp_in", "mlp_out", "final"]), make_recipe(unit="layer"), statistics)
    assert [(unit.unit, unit.kind) for unit in result.units] == [
        ("transformer_blocks.0.ff.net.0.proj", "layer"),
        ("transformer_blocks.0.ff.net.2", "layer"),
        ("transformer_blocks.1.ff.net.0.proj", "layer"),
        ("transformer_blocks.1.ff.net.2", "layer"),
        ("proj_out", "layer"),
    ]
    assert all(unit.error_learned < unit.error_nearest for unit in result.units)


def test_a_killed_run_goes_on_and_gives_the_same(
    model: PixArtModel, statistics: Statistics, fit: Fit, learned: Reconstruction, tmp_path: Path
) -> None:
    events: list[Event] = []

    def cancelled() -> bool:
        return any(event["detail"] == "transformer_blocks.1" for event in events)

    with pytest.raises(Cancelled, match="reconstruct"):
        reconstruct(
            model, fit(), make_recipe(), statistics, folder=tmp_path, on_event=events.append, cancelled=cancelled
        )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["unit-000.json", "unit-000.safetensors"]
    stamp = (tmp_path / "unit-000.json").stat().st_mtime_ns
    resumed = reconstruct(model, fit(), make_recipe(), statistics, folder=tmp_path)
    assert (tmp_path / "unit-000.json").stat().st_mtime_ns == stamp
    assert same_weights(resumed, learned)
    assert [dataclasses.replace(u, seconds=0) for u in resumed.units] == [
        dataclasses.replace(u, seconds=0) for u in learned.units
    ]


def test_stored_units_of_other_settings_are_learned_again(
    model: PixArtModel, statistics: Statistics, fit: Fit, tmp_path: Path
) -> None:
    options = {"folder": tmp_path}
    first = reconstruct(model, fit(["mlp_out"]), make_recipe(iterations=12), statistics, **options)
    again = reconstruct(model, fit(["mlp_out"]), make_recipe(iterations=12), statistics, **options, seed=7)
    assert not same_weights(first, again)
    (tmp_path / "unit-000.safetensors").write_bytes(b"damaged")
    repaired = reconstruct(model, fit(["mlp_out"]), make_recipe(iterations=12), statistics, **options, seed=7)
    assert same_weights(repaired, again)


def test_progress_counts_to_its_end(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    events: list[Event] = []
    reconstruct(model, fit(["self_q"]), make_recipe(iterations=3), statistics, on_event=events.append)
    ours = [event for event in events if event["stage"] == "reconstruct"]
    assert [event["done"] for event in ours] == list(range(1, ours[-1]["total"] + 1))
    assert {event["recipe"] for event in events} == {"learned"}


def test_static_ranges_by_time_group_and_weight_only(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    static = QuantSpec(bits=8, symmetric=False, granularity="tensor", per_time_group=True)
    groups = TimeGroups((500.0,))
    by_group = fit(["mlp_in"], static, ranges=((-4.0, 4.0), (-8.0, 8.0)))
    narrow = fit(["mlp_in"], static, ranges=((-4.0, 4.0), (-0.1, 0.1)))
    weight_only = fit(["mlp_in"], None)
    errors = [
        reconstruct(model, linears, make_recipe(iterations=1), statistics, groups=groups).units[0].error_nearest
        for linears in (weight_only, by_group, narrow)
    ]
    assert errors[0] <= errors[1] * 1.01 < errors[2]


def test_a_loss_that_is_not_finite_names_the_unit(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    broken = fit(["self_q"])
    broken[0] = dataclasses.replace(broken[0], weight=broken[0].weight.clone().fill_(float("nan")))
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.0: the loss .* not finite at iteration 1;"):
        reconstruct(model, broken, make_recipe(), statistics)


def test_a_model_without_blocks_is_told_so(
    model: PixArtModel, statistics: Statistics, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = fit(["mlp_in"])
    layers = tuple(layer._replace(role="other") for layer in model.linears())
    monkeypatch.setattr(model, "linears", lambda: layers)
    with pytest.raises(CalibrationError, match='no transformer block .* use unit "layer"'):
        reconstruct(model, linears, make_recipe(), statistics)


def test_a_linear_of_another_model_is_named(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    foreign = dataclasses.replace(fit(["final"], ACTIVATION)[0], name="elsewhere.linear")
    with pytest.raises(CalibrationError, match=r"elsewhere\.linear"):
        reconstruct(model, [foreign], make_recipe(), statistics)


def test_the_penalty_waits_and_then_sharpens() -> None:
    values = list(betas(ReconstructionSpec(iterations=10, warm_up=0.2)))
    assert values[:2] == [None, None] and values[2] == 20 and values[-1] == 2
    assert list(betas(dataclasses.replace(QUICK, iterations=1)))
