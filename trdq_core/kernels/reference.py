"""The oracle: the kernels in plain torch, transforms and products in float64, the grid in float32 as everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from trdq_core.kernels.packing import folded_weight, pack_weight, unpack_weight
from trdq_core.kernels.types import (
    NO_STAGES,
    InputStages,
    PackedWeight,
    QuantizedActivation,
    StaticGrid,
    check_bits,
    check_input,
    check_product,
)

__all__ = ["linear", "pack_weight", "quantize_activation", "transform", "unpack_weight"]

SMALLEST_RANGE = 1e-12


def transform(x: Tensor, stages: InputStages = NO_STAGES) -> Tensor:
    """T(x) for x of (..., in_features), same shape and dtype, computed in float64 and rounded once."""
    check_input(x, stages)
    return apply_stages(x.double(), stages).to(x.dtype)


def quantize_activation(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
) -> QuantizedActivation:
    """Levels of T(x), x being (..., in_features); one grid per token, or `static` for all of them.

    Symmetric: scale = max(absmax, 1e-12) / (2^(bits-1) - 1), levels clipped to +-(2^(bits-1) - 1), stored + 128.
    Asymmetric: scale = max(hi - lo, 1e-12) / (2^bits - 1) with lo <= 0 <= hi, zero_point = round(-lo / scale).
    Live extremes are multiplied by `clip` first, so that what lies outside saturates. Rounding is half to even.
    """
    check_bits(bits)
    check_input(x, stages)
    rows = x.reshape(-1, x.shape[-1])
    values = apply_stages(rows.double(), stages).float() if not stages.empty else rows.float()
    return quantize_rows(values, bits, symmetric, static, clip)


def linear(activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """(tokens, out_features) float32: the exact integer product, scaled in float64 and rounded once."""
    check_product(activation.values, weight, bias)
    x = activation.values.double() - activation.zero_point.double().unsqueeze(1)
    w = folded_weight(weight).double()
    if weight.zero_point is not None:
        w = w - weight.zero_point.double().unsqueeze(1)
    y = (x @ w.T) * activation.scale.double().unsqueeze(1) * weight.scale.double()
    return (y if bias is None else y + bias.double()).float()


def apply_stages(x: Tensor, stages: InputStages) -> Tensor:
    """T(x) in the dtype of x, float32 or float64; shapes are taken as checked."""
    if stages.inverse_scale is not None:
        x = x * stages.inverse_scale.to(x.dtype)
    if stages.rotation is not None:
        x = _rotate(x, stages.rotation)
    if stages.permutation is not None:
        x = x.index_select(-1, stages.permutation)
    if stages.hadamard_block:
        x = _rotate(x, _hadamard(stages.hadamard_block, x.dtype, x.device))
    if stages.second_rotation is not None:
        x = _rotate(x, stages.second_rotation)
    return x


def quantize_rows(
    x: Tensor, bits: int, symmetric: bool, static: StaticGrid | None, clip: float = 1.0
) -> QuantizedActivation:
    """Levels of float32 rows (tokens, in_features); the arithmetic that every backend must reproduce."""
    half, levels = 2 ** (bits - 1) - 1, 2**bits - 1
    low, high = (128 - half, 128 + half) if symmetric else (0, levels)
    if static is not None:
        scale = static.scale.float().reshape(1).expand(x.shape[0])
        zero_point = static.zero_point.float().reshape(1).clamp(0, 255).expand(x.shape[0])
    elif symmetric:
        scale = (_absmax(x) * clip).clamp_min(SMALLEST_RANGE) / half
        zero_point = torch.full_like(scale, 128.0)
    else:
        lo, hi = (extreme * clip for extreme in _extremes(x))
        scale = (hi - lo).clamp_min(SMALLEST_RANGE) / levels
        zero_point = torch.round(-lo / scale).clamp(0, levels)
    # The zero point is whole, so clipping before adding it gives the same levels and cannot overflow.
    zero = zero_point.unsqueeze(1)
    level = torch.round(x / scale.unsqueeze(1)).clamp(low - zero, high - zero) + zero
    values = torch.nan_to_num(level, nan=0.0).to(torch.uint8)
    row_sum = values.sum(dim=1, dtype=torch.int32)
    return QuantizedActivation(values, scale.contiguous(), zero_point.contiguous(), row_sum)


def _absmax(x: Tensor) -> Tensor:
    return x.abs().amax(dim=1) if x.numel() else x.new_zeros(x.shape[0])


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0])
    return x.amin(dim=1).clamp_max(0.0), x.amax(dim=1).clamp_min(0.0)


def _rotate(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.unflatten(-1, (-1, matrix.shape[0])) @ matrix.to(x.dtype)).flatten(-2)


def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5
