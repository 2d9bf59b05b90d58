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
    scaled = (x / qparams.scale).round()
    if qparams.zero_point is None:
        top = 2 ** (bits - 1) - 1
        return scaled.clamp(-top, top)
    return (scaled + qparams.zero_point).clamp(0, 2**bits - 1)


def dequantize(values: Tensor, qparams: QParams) -> Tensor:
    """The numbers that grid integers stand for."""
    shifted = values if qparams.zero_point is None else values - qparams.zero_point
    return shifted * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams, *, bits: int) -> Tensor:
    """x rounded to the grid, in floating point: what a layer sees of the tensor after quantization."""
    return dequantize(quantize(x, qparams, bits=bits), qparams)


def fake_quantize_tokens(x: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    """x (..., channels) rounded to a grid of its own for each token, ranges taken from the live values."""
    qparams = choose_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits=bits, symmetric=symmetric)
    return fake_quantize(x, qparams, bits=bits)


def fake_quantize_static(x: Tensor, seen: Tensor, *, bits: int, symmetric: bool) -> Tensor:
    """x rounded to one grid for the whole tensor that spans the values of `seen`: what static ranges do to it."""
    return fake_quantize(x, choose_qparams(seen.amin(), seen.amax(), bits=bits, symmetric=symmetric), bits=bits)
