"""Quantized attention products in a whole model: the sampling pass, what is kept of it, and what is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.attention_products import (
    KEYS,
    ROWS,
    SAMPLES,
    SAMPLES_OF_GROUP,
    OperandSampler,
    QuantizedProducts,
    apply_attention,
    attentions,
    fit_attention,
)
from trdq_core.errors import CalibrationError, Cancelled, RecipeError
from trdq_core.nn.attention import Map
from trdq_core.nn.modules import share_copy
from trdq_core.nn.quantized_attention import AttentionGrids
from trdq_core.numerics.twin_region import THRESHOLDS
from trdq_core.sampling import Trajectory, sample
from trdq_core.specs import AttentionSpec
from trdq_core.timegroups import TimeContext, TimeGroups

STEPS = 4
ABOUT = {"prompts": ["red apple"], "steps": STEPS, "guidance": 3.5, "seed": 0}
HALVES = TimeGroups((500.0,))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def grids(model: PixArtModel) -> dict[str, AttentionGrids]:
    spec = AttentionSpec(bits=8, softmax_bits=8, softmax_grid="twin_region", per_time_group=True)
    return fit_attention(model, spec, ABOUT, HALVES)


def run(model: PixArtModel, grids: dict[str, AttentionGrids], guidance: float = 3.5) -> tuple[Trajectory, object]:
    copy, time = share_copy(model.denoiser), TimeContext(TimeGroups())
    time.attach(copy)
    products = apply_attention(copy, grids, time)
    with model.using(copy):
        return sample(model, model.encode(["tiger face"])[0], 1, steps=STEPS, guidance=guidance), products


def plain(model: PixArtModel, guidance: float = 3.5) -> Trajectory:
    return sample(model, model.encode(["tiger face"])[0], 1, steps=STEPS, guidance=guidance)


def distance(a: Trajectory, b: Trajectory) -> float:
    return float((a.latents[-1] - b.latents[-1]).norm() / b.latents[-1].norm())


def test_every_attention_gets_grids_and_cross_ones_only_if_asked(
    model: PixArtModel, grids: dict[str, AttentionGrids]
) -> None:
    blocks = [f"transformer_blocks.{i}.attn{n}" for i in (0, 1) for n in (1, 2)]
    assert list(grids) == attentions(model.linears(), cross=True) == blocks
    own = fit_attention(model, AttentionSpec(cross=False), ABOUT, HALVES)
    assert list(own) == attentions(model.linears(), cross=False) == blocks[::2]
    assert not any(grid.thresholds for grid in own.values()), "uniform grids have no threshold"
    for grid in grids.values():
        assert grid.heads == 2 and grid.groups == HALVES
        assert len(grid.thresholds) == 2 and set(grid.thresholds) <= set(THRESHOLDS)
        assert all((scale > 0).all() for scale in (grid.q_scale, grid.k_scale, grid.v_scale))


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_eight_bits_stay_near_and_fewer_are_further(
    model: PixArtModel, grids: dict[str, AttentionGrids], guidance: float
) -> None:
    reference = plain(model, guidance)
    quantized, products = run(model, grids, guidance)
    coarse = fit_attention(model, AttentionSpec(bits=4, softmax_bits=4), ABOUT, TimeGroups())
    fine_error, coarse_error = distance(quantized, reference), distance(run(model, coarse, guidance)[0], reference)
    assert 0 < fine_error < 0.02 and fine_error < coarse_error / 3
    assert isinstance(products, QuantizedProducts)
    facts = products.facts()
    assert facts["simulated"] is True and facts["attentions"] == 4 and facts["calls"] == 4 * STEPS
    assert (facts["bits"], facts["softmax_bits"], facts["softmax_grid"]) == (8, 8, "twin_region")
    assert facts["edges"] == [500.0] and all(len(t) == 2 for t in facts["thresholds"].values())


def test_the_model_itself_is_left_alone(model: PixArtModel, grids: dict[str, AttentionGrids]) -> None:
    before = plain(model)
    run(model, grids)
    fit_attention(model, AttentionSpec(), ABOUT, TimeGroups())
    assert torch.equal(plain(model).latents[-1], before.latents[-1])
    assert not model.denoiser._forward_pre_hooks


def test_the_search_is_repeatable(model: PixArtModel, grids: dict[str, AttentionGrids]) -> None:
    spec = AttentionSpec(softmax_grid="twin_region", per_time_group=True)
    for name, again in fit_attention(model, spec, ABOUT, HALVES).items():
        assert torch.equal(again.q_scale, grids[name].q_scale) and again.thresholds == grids[name].thresholds


def test_only_the_threshold_of_the_present_group_matters(model: PixArtModel, grids: dict[str, AttentionGrids]) -> None:
    """methods of time groups: changing group 0 (late steps) leaves the steps of group 1 bit for bit."""
    changed = {
        name: AttentionGrids(g.q_scale, g.k_scale, g.v_scale, 8, 3, (1.0, g.thresholds[1]), g.groups)
        for name, g in grids.items()
    }
    same = {
        name: AttentionGrids(g.q_scale, g.k_scale, g.v_scale, 8, 3, g.thresholds, g.groups) for name, g in grids.items()
    }
    (a, _), (b, _) = run(model, changed), run(model, same)
    late = [t < 500 for t in a.timesteps]
    first = late.index(True)
    assert first > 0
    for step in range(first):
        assert torch.equal(a.latents[step], b.latents[step])
    assert not torch.equal(a.latents[-1], b.latents[-1])


def test_it_can_be_cancelled_and_reports_itself(model: PixArtModel) -> None:
    events: list[dict] = []
    fit_attention(model, AttentionSpec(cross=False), ABOUT, TimeGroups(), on_event=events.append)
    assert [(e["stage"], e["done"], e["total"]) for e in events] == [
        *(("observe", i + 1, STEPS) for i in range(STEPS)), ("fit", 1, 2), ("fit", 2, 2),
    ]  # fmt: skip
    with pytest.raises(Cancelled):
        fit_attention(model, AttentionSpec(), ABOUT, TimeGroups(), cancelled=lambda: True)


def test_grids_of_another_model_and_other_attentions_are_refused(
    model: PixArtModel, grids: dict[str, AttentionGrids]
) -> None:
    name, grid = next(iter(grids.items()))
    one = AttentionGrids(grid.q_scale[:1], grid.k_scale[:1], grid.v_scale[:1], 8, 8)
    with pytest.raises(CalibrationError, match=f"{name}: got attention grids of 1 heads for 2"):
        apply_attention(share_copy(model.denoiser), {name: one}, TimeContext(TimeGroups()))
    copy = share_copy(model.denoiser)
    apply_attention(copy, grids, TimeContext(TimeGroups()))
    with pytest.raises(RecipeError, match=r"attention \(QuantizedAttention\) cannot be quantized"):
        apply_attention(copy, grids, TimeContext(TimeGroups()))


def operands(batch: int, rows: int, keys: int) -> tuple[Map, torch.Tensor]:
    q, k, v = (torch.randn(batch, 2, n, 4) for n in (rows, keys, keys))
    return Map(q, k, None), v


def test_what_is_kept_is_bounded_however_much_comes() -> None:
    torch.manual_seed(0)
    time = TimeContext(TimeGroups((250.0, 500.0, 750.0)))
    sampler = OperandSampler("attention", time, 0)
    for timestep in range(0, 1000, 10):
        time.set(timestep)
        sampler.observe(*operands(3, 40, KEYS + 30))
    samples = sampler.samples()
    kept = max(SAMPLES_OF_GROUP, SAMPLES // 4)
    assert samples.q.shape == (4 * kept, 2, ROWS, 4) and samples.k.shape == samples.v.shape == (4 * kept, 2, KEYS, 4)
    assert samples.map.shape == (4 * kept, 2, ROWS, KEYS) and samples.q.dtype == torch.float16
    assert [sum(time.groups.group_of(t) == g for t in samples.timesteps) for g in range(4)] == [kept] * 4
    assert len(set(samples.timesteps)) > 2 * kept, "the reservoir is not what came first"
    assert (samples.map.sum(-1) < 1).all(), "probabilities are those over all keys, of which some were drawn"


def test_hidden_keys_count_nowhere() -> None:
    torch.manual_seed(0)
    time = TimeContext(TimeGroups())
    (q, k, _), v = operands(2, 5, 8)
    k[:, :, 6:], v[:, :, 6:] = 100.0, 200.0
    mask = torch.zeros(2, 2, 1, 8)
    mask[..., 6:] = -10000.0
    sampler = OperandSampler("attention", time, 0)
    sampler.observe(Map(q, k, mask), v)
    samples = sampler.samples()
    assert samples.k.shape[2] == 6 and samples.absmax[1:].max() < 10
    assert torch.allclose(samples.map.sum(-1), torch.ones(2, 2, 5))
    everything = OperandSampler("attention", time, 0)
    everything.observe(Map(q, k, torch.full_like(mask, -10000.0)), v)
    assert everything.samples().k.shape[2] == 8, "equal offsets hide nothing"


def test_damaged_operands_and_silent_attentions_are_named() -> None:
    time = TimeContext(TimeGroups())
    sampler = OperandSampler("block.attn1", time, 0)
    with pytest.raises(CalibrationError, match=r"block\.attn1: .* never called"):
        sampler.samples()
    (q, k, mask), v = operands(1, 3, 3)
    v[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"block\.attn1: .* not finite"):
        sampler.observe(Map(q, k, mask), v)
