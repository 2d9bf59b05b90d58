"""The uniform grid. The same conventions hold in every kernel.

symmetric:   scale = absmax / (2^(b-1) - 1),  q = round(x / scale) in [-(2^(b-1) - 1), 2^(b-1) - 1]
asymmetric:  scale = (high - low) / (2^b - 1) with low <= 0 <= high,  zero_point = round(-low / scale),
             q = round(x / scale) + zero_point in [0, 2^b - 1]
Rounding is half to even; scales are at least TINY / levels, so zeros and constants stay finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import ShapeError

TINY = 1e-12


class QParams(NamedTuple):
    """Scale and zero point of a grid; the zero point is None where the grid is symmetric. Both broadcast against the tensor."""

    scale: Tensor
    zero_point: Tensor | None


def choose_qparams(low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> QParams:
    """The grid that spans low..high, zero included."""
    if symmetric:
        absmax = torch.maximum(low.abs(), high.abs()).clamp_min(TINY)
        return QParams(absmax / (2 ** (bits - 1) - 1), None)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low).clamp_min(TINY) / (2**bits - 1)
    return QParams(scale, (-low / scale).round().clamp(0, 2**bits - 1))


def quantize(x: Tensor, qparams: QParams, *, bits: int) -> Tensor:
    """Integers of the grid, in x's floating dtype."""
    scaled = (x / qparams.scale).round_()  # in place what is ours alone: whole weights come through here
    if qparams.zero_point is None:
        top = 2 ** (bits - 1) - 1
        return scaled.clamp_(-top, top)
    return scaled.add_(qparams.zero_point).clamp_(0, 2**bits - 1)


def dequantize(values: Tensor, qparams: QParams) -> Tensor:
    """The numbers that grid integers stand for."""
    shifted = values if qparams.zero_point is None else values - qparams.zero_point
    return shifted * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams, *, bits: int) -> Tensor:
    """x rounded to the grid, in floating point: what a layer sees of the tensor after quantization."""
    return dequantize(quantize(x, qparams, bits=bits), qparams)


def fake_quantize_tokens(x: Tensor, *, bits: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    """x (..., channels) rounded to a grid of its own for each token, ranges taken from the live values, times `clip`."""
    low, high = x.amin(-1, keepdim=True) * clip, x.amax(-1, keepdim=True) * clip
    return fake_quantize(x, choose_qparams(low, high, bits=bits, symmetric=symmetric), bits=bits)


def fake_quantize_groups(x: Tensor, *, bits: int, symmetric: bool, group_size: int, clip: float = 1.0) -> Tensor:
    """x (..., channels) rounded to a grid for each token and each `group_size` consecutive channels (Q-DiT, SVDQuant)."""
    if x.shape[-1] % group_size:
        raise ShapeError(
            f"activation: group_size={group_size} does not divide its {x.shape[-1]} channels; "
            'use a divisor or granularity="token".'
        )
    groups = x.unflatten(-1, (-1, group_size))
    return fake_quantize_tokens(groups, bits=bits, symmetric=symmetric, clip=clip).flatten(-2)


def fake_quantize_static(x: Tensor, seen: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    """x rounded to one grid for the whole tensor that spans the values of `seen`: what static ranges do to it."""
    return fake_quantize(x, choose_qparams(seen.amin(), seen.amax(), bits=bits, symmetric=symmetric), bits=bits)
