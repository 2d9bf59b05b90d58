"""Calibration artefacts: saved, loaded, refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trdq_core.errors import CalibrationError, StorageError
from trdq_core.specs import TimeGroupSpec, TransformSpec
from trdq_core.statistics import LayerStatistics, Statistics
from trdq_core.timegroups import TimeGroups


def make() -> Statistics:
    generator = torch.Generator().manual_seed(0)
    layer = LayerStatistics(
        torch.rand(3, 4, 8, generator=generator).half(), torch.randn(3, 6, 8, generator=generator).half()
    )
    return Statistics((900.0, 500.0, 100.0), {"block.to_q": layer}, {"fingerprint": "abc", "model": "tiny"})


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    statistics = make()
    statistics.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert loaded.timesteps == statistics.timesteps
    assert torch.equal(loaded.layer("block.to_q").rows, statistics.layer("block.to_q").rows)
    assert torch.equal(loaded.layer("block.to_q").item_absmax, statistics.layer("block.to_q").item_absmax)
    assert loaded.about["fingerprint"] == "abc"


def test_damaged_newer_and_missing_artefacts_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="damaged"):
        Statistics.load(tmp_path / "nothing")
    make().save(tmp_path)
    data = (tmp_path / "statistics.safetensors").read_bytes()
    (tmp_path / "statistics.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CalibrationError, match="damaged .* delete it and calibrate again"):
        Statistics.load(tmp_path)
    about = json.loads((tmp_path / "statistics.json").read_text())
    (tmp_path / "statistics.json").write_text(json.dumps({**about, "format_version": 99}))
    with pytest.raises(CalibrationError, match="format 99 is newer"):
        Statistics.load(tmp_path)


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="calibration: could not write"):
        make().save(tmp_path / "file" / "sub")


def test_absmax_merges_as_the_recipe_says() -> None:
    layer = make().layer("block.to_q")
    items = layer.item_absmax.float()
    assert torch.equal(layer.absmax([0, 1], TransformSpec(kind="smooth")), items[:2].amax((0, 1)))
    expected = items[0, 0]
    for item in items[0, 1:]:
        expected = 0.5 * expected + 0.5 * item
    assert torch.allclose(layer.absmax([0], TransformSpec(kind="smooth", absmax="ema", momentum=0.5)), expected)


def test_spearman_weighs_items_that_disagree_with_the_weights_most() -> None:
    weight_absmax = torch.arange(1.0, 9.0)
    agrees, disagrees = weight_absmax.clone(), weight_absmax.flip(0)
    layer = LayerStatistics(torch.stack([agrees, disagrees])[None].half(), torch.zeros(1, 1, 8).half())
    merged = layer.absmax([0], TransformSpec(kind="smooth", absmax="spearman"), weight_absmax)
    share = torch.tensor([-1.0, 1.0]).softmax(0)  # rho is 1 and -1
    assert torch.allclose(merged, share[0] * agrees + share[1] * disagrees)
    with pytest.raises(CalibrationError, match='absmax "spearman": .* pass weight_absmax'):
        layer.absmax([0], TransformSpec(kind="smooth", absmax="spearman"))


def test_equal_items_give_their_own_ranges_however_they_are_weighed() -> None:
    item = torch.rand(8).half()
    layer = LayerStatistics(item.expand(3, 2, 8), torch.zeros(3, 1, 8).half())
    for merge in ("max", "ema", "spearman"):
        merged = layer.absmax([0, 2], TransformSpec(kind="smooth", absmax=merge), torch.rand(8))
        assert torch.allclose(merged, item.float())


def test_statistics_cut_the_time_axis_by_their_own_ranges() -> None:
    ranges = torch.tensor([1.0, 1.0, 20.0])[:, None, None].expand(3, 2, 8).half()
    layer = LayerStatistics(ranges, torch.zeros(3, 1, 8).half())
    statistics = Statistics((900.0, 500.0, 100.0), {"block.to_q": layer}, {})
    assert statistics.groups(TimeGroupSpec(kind="dp", count=2)) == TimeGroups((300.0,))
    assert statistics.groups(TimeGroupSpec(count=2)) == TimeGroups((500.0,))


def test_groups_take_their_own_timesteps_and_borrow_the_nearest() -> None:
    statistics = make()
    groups = TimeGroups((450.0, 950.0))
    assert [statistics.steps_of(groups, g) for g in range(3)] == [[2], [0, 1], [0]]


def test_an_unobserved_layer_is_named() -> None:
    with pytest.raises(CalibrationError, match="block.other: this calibration did not observe"):
        make().layer("block.other")
