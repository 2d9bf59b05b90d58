"""Weights to integers: round to nearest over min-max or searched ranges, per channel or with two-level group scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import ShapeError
from trdq_core.numerics.affine import TINY, QParams, choose_qparams, fake_quantize, quantize
from trdq_core.specs import QuantSpec

CLIP_RATIOS = tuple(1 - 0.0125 * i for i in range(41))  # 1.0 included, so a searched range is never worse than min-max
LARGEST_GROUP_SCALE = 16  # 16 * 7 = 112 still fits an int8, so the group scale folds into the integer weight


class QuantizedWeight(NamedTuple):
    """A weight (out, in) as integers: weight = (values * group_scale - zero_point) * scale."""

    values: Tensor  # (out, in) int8 in [-2^(b-1), 2^(b-1) - 1]
    scale: Tensor  # (out,) fp32
    zero_point: Tensor | None  # (out,) fp32, integers in the domain of `values`
    group_scale: Tensor | None  # (out, in / group_size) int8 in 1..16
    group_size: int
    bits: int


def quantize_weight(weight: Tensor, spec: QuantSpec, *, layer: str = "weight") -> QuantizedWeight:
    """`weight` (out, in) on the grid of `spec`; ShapeError names `layer` if the group size does not divide its width."""
    weight = weight.double()
    if spec.granularity == "group":
        return _two_level(weight, spec, layer)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if spec.granularity == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    qparams = _search(weight, low, high, spec) if spec.range == "mse" else _grid(low, high, spec)
    values = quantize(weight, qparams, bits=spec.bits)
    zero_point = qparams.zero_point
    if zero_point is not None:
        # Unsigned codes and zero points move down together, so that every stored weight is a signed integer.
        half = 2 ** (spec.bits - 1)
        values, zero_point = values - half, (zero_point - half)[:, 0].float()
    return QuantizedWeight(values.to(torch.int8), qparams.scale[:, 0].float(), zero_point, None, 0, spec.bits)


def dequantize_weight(quantized: QuantizedWeight) -> Tensor:
    """The weight (out, in) float64 that the integers stand for."""
    values = quantized.values.double()
    if quantized.group_scale is not None:
        values = values * quantized.group_scale.double().repeat_interleave(quantized.group_size, 1)
    if quantized.zero_point is not None:
        values = values - quantized.zero_point.double()[:, None]
    return values * quantized.scale.double()[:, None]


def _grid(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    # fp32 scales are what the kernels read: rounding them before the integers are chosen keeps both consistent.
    scale, zero_point = choose_qparams(low, high, bits=spec.bits, symmetric=spec.symmetric)
    return QParams(scale.float().double(), zero_point)


def _search(weight: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    best, best_error = _grid(low, high, spec), None
    for ratio in CLIP_RATIOS:
        candidate = _grid(low * ratio, high * ratio, spec)
        error = (fake_quantize(weight, candidate, bits=spec.bits) - weight).square().sum(1, keepdim=True)
        if spec.granularity == "tensor":
            error = error.sum().expand_as(error)
        if best_error is None:
            best, best_error = candidate, error
            continue
        better = error < best_error
        zero_point = None if best.zero_point is None else torch.where(better, candidate.zero_point, best.zero_point)
        best = QParams(torch.where(better, candidate.scale, best.scale), zero_point)
        best_error = torch.minimum(error, best_error)
    return best


def _two_level(weight: Tensor, spec: QuantSpec, layer: str) -> QuantizedWeight:
    """Group scales as small integers over one fp32 scale a channel (QServe, arXiv 2405.04532): no fp work inside the dot."""
    out_features, in_features = weight.shape
    size = spec.group_size or in_features
    if in_features % size:
        divisors = [d for d in (32, 64, 96, 128, 144, 192, 256) if in_features % d == 0]
        raise ShapeError(
            f"{layer}: group_size={size} does not divide in_features={in_features}; "
            f'use one of {", ".join(map(str, divisors)) or "its divisors"} or granularity="channel".'
        )
    if spec.bits != 4:
        raise ShapeError(f"{layer}: group scales are for 4-bit weights, got {spec.bits} bits; use granularity=channel.")
    top = 2 ** (spec.bits - 1) - 1
    blocks = weight.reshape(out_features, -1, size)
    wanted = blocks.abs().amax(2).clamp_min(TINY) / top
    scale = (wanted.amax(1, keepdim=True) / LARGEST_GROUP_SCALE).float().double()
    group_scale = (wanted / scale).ceil().clamp(1, LARGEST_GROUP_SCALE)
    values = (blocks / (scale * group_scale)[:, :, None]).round().clamp(-top, top).reshape(weight.shape)
    return QuantizedWeight(
        values.to(torch.int8), scale[:, 0].float(), None, group_scale.to(torch.int8), size, spec.bits
    )
