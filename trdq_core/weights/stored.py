"""What a quantized weight is kept as: integers that the kernels multiply, or codes that only a table of levels explains."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trdq_core.numerics.packing import packed_size
from trdq_core.numerics.twin_log import TwinLog

CodedGrid = Literal["uniform", "twin_log"]


class QuantizedWeight(NamedTuple):
    """A weight (out, in) as integers: weight = (values * group_scale - zero_point) * scale."""

    values: Tensor  # (out, in) int8 in [-2^(b-1), 2^(b-1) - 1]
    scale: Tensor  # (out,) fp32
    zero_point: Tensor | None  # (out,) fp32, integers in the domain of `values`
    group_scale: Tensor | None  # (out, in / group_size) int8 in 1..16
    group_size: int
    bits: int


class CodedWeight(NamedTuple):
    """A weight (out, in) as numbers of levels; each row and group of columns has its own 2^bits levels.

    parameters of "uniform": scale, or scale and zero point; of "twin_log": the largest magnitude and the growth.
    """

    codes: Tensor  # (out, in) uint8 below 2^bits
    parameters: Tensor  # (out, groups, P) fp32
    grid: CodedGrid
    group_size: int  # columns a group
    bits: int


Weight = QuantizedWeight | CodedWeight


def level_table(weight: CodedWeight) -> Tensor:
    """What each code stands for: (out, groups, 2^bits) float64.

    Symmetric uniform codes are the integer plus 2^(bits-1); twin-log codes have the sign as their highest bit.
    """
    parameters = weight.parameters.double()
    half = 2 ** (weight.bits - 1)
    if weight.grid == "uniform":
        codes = torch.arange(2 * half, dtype=torch.float64, device=parameters.device)
        zero_point = parameters[..., 1:2] if parameters.shape[-1] == 2 else half
        return (codes - zero_point) * parameters[..., :1]
    rows = parameters.flatten(0, 1)
    magnitudes = TwinLog(rows[:, :1], rows[:, 1:], weight.bits).magnitudes()
    return torch.cat([magnitudes, -magnitudes], 1).view(*parameters.shape[:2], -1)


def dequantize_weight(weight: Weight, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight (out, in) that the integers or codes stand for, exact in float64 and rounded once in float32."""
    if isinstance(weight, CodedWeight):
        blocks = weight.codes.unflatten(1, (-1, weight.group_size)).long()
        return level_table(weight).gather(2, blocks).flatten(1).to(dtype)
    values = weight.values.to(dtype)  # integers, and so exact in float32 too until they meet the scale
    if weight.group_scale is not None:
        values.mul_(weight.group_scale.to(dtype).repeat_interleave(weight.group_size, 1))
    if weight.zero_point is not None:
        values.sub_(weight.zero_point.to(dtype)[:, None])
    return values.mul_(weight.scale.to(dtype)[:, None])


def packed_bytes(weight: Weight) -> int:
    """Bytes in a file: codes without a gap, four for each fp32 parameter, one for each zero point and integer group scale."""
    if isinstance(weight, CodedWeight):
        integers = weight.parameters[..., 1:].numel() if weight.grid == "uniform" else 0
        return packed_size(weight.codes.numel(), weight.bits) + 4 * (weight.parameters.numel() - integers) + integers
    extras = [part.numel() for part in (weight.zero_point, weight.group_scale) if part is not None]
    return packed_size(weight.values.numel(), weight.bits) + 4 * weight.scale.numel() + sum(extras)
