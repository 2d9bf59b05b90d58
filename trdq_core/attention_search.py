"""The grids of one attention's products, searched on samples of its operands: the scales of q and k for the error of the
scores, the scale of v and the thresholds of the softmax grid for the error of the output (PTQ4ViT, TQ-DiT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError
from trdq_core.nn.quantized_attention import AttentionGrids, quantize_heads, quantize_map
from trdq_core.numerics.affine import TINY
from trdq_core.numerics.candidates import ROUNDS, search_scale
from trdq_core.numerics.twin_region import THRESHOLDS
from trdq_core.specs import TIME_SPAN, AttentionSpec
from trdq_core.timegroups import TimeGroups


class OperandSamples(NamedTuple):
    """Sampled operands of one attention. A sample is one item of one call: some of its queries, and keys they look at.

    Keys beyond those an item has, and those a mask hides, are zero in all three tensors.
    """

    q: Tensor  # (samples, heads, rows, width) fp16
    k: Tensor  # (samples, heads, keys, width) fp16
    v: Tensor  # (samples, heads, keys, width) fp16
    map: Tensor  # (samples, heads, rows, keys) fp32, over all keys of the item before some were drawn
    timesteps: tuple[float, ...]  # of each sample
    absmax: Tensor  # (3, heads) fp32, of q, k and v over everything that was seen, hidden keys left out


def search_grids(samples: OperandSamples, spec: AttentionSpec, groups: TimeGroups) -> AttentionGrids:
    """The grids with the least error on `samples`. `groups` cut the time axis for the thresholds, where the spec asks for it."""
    if not samples.timesteps:
        raise CalibrationError("attention: no operands were sampled; calibrate with at least one prompt.")
    groups = groups if spec.per_time_group else TimeGroups()
    q, k = search_scores(samples.q.float(), samples.k.float(), samples.absmax[:2], spec.bits)
    parts = [_inside(samples.timesteps, groups, index) for index in range(groups.count)]
    v, thresholds = _search_output(samples, spec, parts)
    return AttentionGrids(q, k, v, spec.bits, spec.softmax_bits, thresholds, groups)


def search_scores(q: Tensor, k: Tensor, absmax: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales (heads,) of q and k with the least squared error of q k^T, found in turns; `absmax` is (2, heads)."""
    exact = q @ k.transpose(-1, -2)
    q_scale, k_scale = (absmax.clamp_min(TINY) / (2 ** (bits - 1) - 1)).unbind()
    for _ in range(ROUNDS):
        before = q_scale, k_scale
        seen = quantize_heads(k, k_scale, bits).transpose(-1, -2)
        q_scale = search_scale(
            absmax[0], bits, lambda s, other=seen: per_head(quantize_heads(q, s, bits) @ other - exact)
        )
        seen = quantize_heads(q, q_scale, bits)
        k_scale = search_scale(
            absmax[1],
            bits,
            lambda s, other=seen: per_head(other @ quantize_heads(k, s, bits).transpose(-1, -2) - exact),
        )
        if torch.equal(before[0], q_scale) and torch.equal(before[1], k_scale):
            break  # further rounds would see the same operands
    return q_scale, k_scale


def search_values(v: Tensor, exact: Tensor, maps: Tensor, absmax: Tensor, bits: int) -> Tensor:
    """The scale (heads,) of v with the least squared error of `maps` Q(v) against `exact`."""
    return search_scale(absmax, bits, lambda s: per_head(maps @ quantize_heads(v, s, bits) - exact))


def search_threshold(maps: Tensor, values: Tensor, exact: Tensor, bits: int) -> float:
    """The softmax threshold, one for all heads, with the least squared error of Q(maps) `values` against `exact`."""
    errors = [float((quantize_map(maps, bits, t) @ values - exact).square().sum()) for t in THRESHOLDS]
    return THRESHOLDS[min(range(len(errors)), key=errors.__getitem__)]


def per_head(error: Tensor) -> Tensor:
    """Squared errors (samples, heads, ...) summed for each head: (heads,)."""
    return error.square().sum((0, 2, 3))


def _search_output(
    samples: OperandSamples, spec: AttentionSpec, parts: Sequence[Sequence[int]]
) -> tuple[Tensor, tuple[float, ...]]:
    """The scale of v, and the threshold of each group of samples in `parts`, in turns where there are thresholds."""
    maps, v, absmax = samples.map, samples.v.float(), samples.absmax[2]
    exact = maps @ v
    if spec.softmax_grid == "uniform":
        return search_values(v, exact, quantize_map(maps, spec.softmax_bits, None), absmax, spec.bits), ()
    v_scale, thresholds = absmax.clamp_min(TINY) / (2 ** (spec.bits - 1) - 1), ()
    for _ in range(ROUNDS):
        before = v_scale, thresholds
        seen = quantize_heads(v, v_scale, spec.bits)
        thresholds = tuple(
            search_threshold(maps[part], seen[part], exact[part], spec.softmax_bits) for part in map(list, parts)
        )
        quantized = maps.clone()
        for part, threshold in zip(map(list, parts), thresholds, strict=True):
            quantized[part] = quantize_map(maps[part], spec.softmax_bits, threshold)
        v_scale = search_values(v, exact, quantized, absmax, spec.bits)
        if torch.equal(before[0], v_scale) and before[1] == thresholds:
            break
    return v_scale, thresholds


def _inside(timesteps: Sequence[float], groups: TimeGroups, group: int) -> list[int]:
    """The samples of a group; those of the nearest timestep if the group saw none."""
    inside = [i for i, t in enumerate(timesteps) if groups.group_of(t) == group]
    if inside:
        return inside
    borders = [0.0, *groups.edges, TIME_SPAN]
    middle = (borders[group] + borders[group + 1]) / 2
    nearest = min(timesteps, key=lambda t: abs(t - middle))
    return [i for i, t in enumerate(timesteps) if t == nearest]
