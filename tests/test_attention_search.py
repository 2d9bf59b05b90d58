"""The search of attention grids on samples: against an exhaustive one, against min-max, and per time group."""

from __future__ import annotations

import itertools

import pytest
import torch

from trdq_core.attention_search import (
    OperandSamples,
    per_head,
    search_grids,
    search_scores,
    search_threshold,
)
from trdq_core.errors import CalibrationError
from trdq_core.nn.quantized_attention import quantize_heads, quantize_map
from trdq_core.numerics.candidates import scale_candidates, search_scale
from trdq_core.numerics.twin_region import SCALES, THRESHOLDS
from trdq_core.specs import AttentionSpec
from trdq_core.timegroups import TimeGroups


def samples(sharpness: tuple[float, ...] = (1.0,), outlier: float = 1.0) -> OperandSamples:
    """Four samples for each sharpness of the softmax, at timesteps 0, 100, ...; two heads of very different size."""
    torch.manual_seed(0)
    parts = []
    for factor in sharpness:
        q, k, v = (torch.randn(4, 2, n, 8) * torch.tensor([1.0, 20.0])[:, None, None] for n in (6, 32, 32))
        q[0, :, 0, 0] *= outlier
        logits = torch.randn(4, 2, 6, 32) * factor
        parts.append((q, k, v, logits.softmax(-1)))
    q, k, v, maps = (torch.cat(field) for field in zip(*parts, strict=True))
    timesteps = tuple(100.0 * (i // 4) for i in range(4 * len(sharpness)))
    absmax = torch.stack([x.abs().amax((0, 2, 3)) for x in (q, k, v)])
    return OperandSamples(q.half(), k.half(), v.half(), maps, timesteps, absmax)


def minmax(absmax: torch.Tensor, bits: int) -> torch.Tensor:
    return absmax / (2 ** (bits - 1) - 1)


def test_the_candidates_are_those_of_the_paper_and_min_max() -> None:
    assert len(SCALES) == 101 and SCALES[0] == 0.01 and SCALES[-1] == pytest.approx(1.2)
    found = list(scale_candidates(torch.tensor([1.0, 0.0]), 4))
    assert len(found) == 102 and found[0][0] == pytest.approx(1 / 7)
    assert found[-1][0] == pytest.approx(1.2 / 7.5)
    assert all((scale > 0).all() for scale in found), "zeros keep a finite scale"
    assert THRESHOLDS[0] == 1 and THRESHOLDS[-1] == 2.0**-19


def test_the_searched_scale_is_the_least_error_for_each_entry() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 400) * torch.tensor([[1.0], [5.0], [0.1]])
    x[1, 0] = 100.0

    def error(scale: torch.Tensor) -> torch.Tensor:
        return ((x / scale[:, None]).round().clamp(-7, 7) * scale[:, None] - x).square().sum(1)

    best = error(search_scale(x.abs().amax(1), 4, error))
    every = torch.stack([error(scale) for scale in scale_candidates(x.abs().amax(1), 4)])
    assert torch.equal(best, every.amin(0)) and (best <= every[0]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_scores_are_never_worse_than_min_max(bits: int) -> None:
    given = samples(outlier=8.0)
    q, k = given.q.float(), given.k.float()
    exact = q @ k.transpose(-1, -2)

    def error(scales: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return per_head(
            quantize_heads(q, scales[0], bits) @ quantize_heads(k, scales[1], bits).transpose(-1, -2) - exact
        )

    found = error(search_scores(q, k, given.absmax[:2], bits))
    spanned = error((minmax(given.absmax[0], bits), minmax(given.absmax[1], bits)))
    assert (found <= spanned).all()
    if bits == 4:
        assert (found < 0.8 * spanned).all(), "an outlier is worth clipping at four bits"


def test_invariant_21_the_twin_region_map_beats_the_uniform_one() -> None:
    """Same bits, softmax rows with many small and few large values; the searched threshold minimises the output error."""
    torch.manual_seed(0)
    maps, v = (2 * torch.randn(4, 2, 16, 256)).softmax(-1), torch.randn(4, 2, 256, 8)
    exact = maps @ v
    for bits in (6, 8):
        threshold = search_threshold(maps, v, exact, bits)
        twin = quantize_map(maps, bits, threshold)
        errors = {t: float((quantize_map(maps, bits, t) @ v - exact).square().sum()) for t in THRESHOLDS}
        assert errors[threshold] == min(errors.values())
        uniform = quantize_map(maps, bits, None)
        assert (twin - maps).square().mean() < (uniform - maps).square().mean() / 3
        assert ((twin >= 0) & (twin <= 1)).all()
        large, step = maps > threshold, 1 / (2 ** (bits - 1) - 1)
        assert abs(float((twin - maps)[large].mean())) <= step / 4, "no bias above the threshold"


def test_thresholds_follow_their_time_group() -> None:
    given = samples((0.3, 6.0))  # flat maps at timestep 0, peaked ones at 100
    spec = AttentionSpec(bits=8, softmax_bits=6, softmax_grid="twin_region", per_time_group=True)
    groups = TimeGroups((50.0,))
    grids = search_grids(given, spec, groups)
    assert len(grids.thresholds) == 2 and grids.thresholds[0] < grids.thresholds[1]
    alone = search_grids(samples((0.3,)), spec, TimeGroups())
    assert alone.thresholds[0] == grids.thresholds[0]
    assert (grids.threshold(10.0), grids.threshold(500.0)) == grids.thresholds
    single = search_grids(given, AttentionSpec(softmax_grid="twin_region"), groups)
    assert len(single.thresholds) == 1 and single.groups.count == 1, "one threshold unless the spec asks for more"


def test_a_group_without_samples_takes_the_nearest_timestep() -> None:
    given = samples((0.3, 6.0))
    spec = AttentionSpec(softmax_bits=6, softmax_grid="twin_region", per_time_group=True)
    few = search_grids(given, spec, TimeGroups((50.0,)))
    many = search_grids(given, spec, TimeGroups((50.0, 150.0, 800.0)))
    assert many.thresholds == (few.thresholds[0], *(few.thresholds[1],) * 3)


def test_the_whole_search_is_never_worse_than_min_max_and_the_best_of_its_last_turn() -> None:
    given = samples((1.0, 4.0))
    exact = given.map @ given.v.float()
    for spec in (
        AttentionSpec(bits=4, softmax_bits=4),
        AttentionSpec(bits=4, softmax_bits=4, softmax_grid="twin_region"),
    ):
        grids = search_grids(given, spec, TimeGroups())
        threshold = grids.threshold(0.0)

        def error(v_scale: torch.Tensor, level: float | None) -> float:
            maps = quantize_map(given.map, 4, level)
            return float((maps @ quantize_heads(given.v.float(), v_scale, 4) - exact).square().sum())

        levels = (None,) if threshold is None else THRESHOLDS
        spanned = minmax(given.absmax[2], 4)
        assert error(grids.v_scale, threshold) <= min(error(spanned, level) for level in levels)


def test_two_heads_do_not_disturb_each_other() -> None:
    given = samples()
    both = search_scores(given.q.float(), given.k.float(), given.absmax[:2], 6)
    for head, (scales, name) in itertools.product((0, 1), zip(both, ("q", "k"), strict=True)):
        alone = search_scores(
            given.q[:, head : head + 1].float(),
            given.k[:, head : head + 1].float(),
            given.absmax[:2, head : head + 1],
            6,
        )
        assert torch.allclose(alone["qk".index(name)], scales[head : head + 1]), name


def test_invariant_25_zeros_and_single_tokens_are_finite() -> None:
    zero = torch.zeros(2, 2, 1, 4)
    given = OperandSamples(zero, zero, zero, torch.ones(2, 2, 1, 1), (0.0, 0.0), torch.zeros(3, 2))
    grids = search_grids(given, AttentionSpec(softmax_grid="twin_region"), TimeGroups())
    assert all(torch.isfinite(s).all() and (s > 0).all() for s in (grids.q_scale, grids.k_scale, grids.v_scale))
    empty = given._replace(timesteps=())
    with pytest.raises(CalibrationError, match="no operands were sampled"):
        search_grids(empty, AttentionSpec(), TimeGroups())
