"""The C++ kernels as operators `torch.ops.trdq.*`, with shape functions, so that torch.compile can trace past them."""

from __future__ import annotations

import torch
from torch import Tensor

from trdq_core.kernels import calls, native
from trdq_core.kernels.types import InputStages, PackedWeight, QuantizedActivation, StaticGrid


@torch.library.custom_op("trdq::transform", mutates_args=(), device_types="cpu")
def transform(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
) -> Tensor:
    """T(x) for x of (tokens, in_features); the stages of `InputStages`, one by one."""
    stages = InputStages(inverse_scale, rotation, permutation, hadamard_block, second_rotation)
    return calls.transform_rows(native.load().functions, x, stages)


@transform.register_fake
def _(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("trdq::quantize_activation", mutates_args=(), device_types="cpu")
def quantize_activation(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
    bits: int,
    symmetric: bool,
    static_scale: Tensor | None,
    static_zero_point: Tensor | None,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, scale, zero_point and row_sum of T(x) for x of (tokens, in_features)."""
    stages = InputStages(inverse_scale, rotation, permutation, hadamard_block, second_rotation)
    static = _grid(static_scale, static_zero_point)
    return tuple(calls.quantize_rows(native.load().functions, x, stages, bits, symmetric, static, clip))


@quantize_activation.register_fake
def _(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
    bits: int,
    symmetric: bool,
    static_scale: Tensor | None,
    static_zero_point: Tensor | None,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty((tokens,), dtype=torch.float32),
        x.new_empty((tokens,), dtype=torch.float32),
        x.new_empty((tokens,), dtype=torch.int32),
    )


@torch.library.custom_op("trdq::linear", mutates_args=(), device_types="cpu")
def linear(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_sum: Tensor,
    data: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    column_sum: Tensor,
    group_scale: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """(tokens, out_features) float32; the fields of `QuantizedActivation`, then those of `PackedWeight`, then the bias."""
    weight = PackedWeight(
        data,
        weight_scale,
        weight_zero_point,
        column_sum,
        group_scale,
        bits,
        group_size,
        in_features,
        out_features,
    )
    activation = QuantizedActivation(values, scale, zero_point, row_sum)
    return calls.product(native.load().functions, activation, weight, bias)


@linear.register_fake
def _(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_sum: Tensor,
    data: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    column_sum: Tensor,
    group_scale: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    return values.new_empty((values.shape[0], out_features), dtype=torch.float32)


@torch.library.custom_op("trdq::linear_from_float", mutates_args=(), device_types="cpu")
def linear_from_float(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
    bits: int,
    symmetric: bool,
    static_scale: Tensor | None,
    static_zero_point: Tensor | None,
    clip: float,
    data: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    column_sum: Tensor,
    group_scale: Tensor | None,
    weight_bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """(tokens, out_features) float32 for x of (tokens, in_features): quantization and product in one."""
    stages = InputStages(inverse_scale, rotation, permutation, hadamard_block, second_rotation)
    sizes = (weight_bits, group_size, in_features, out_features)
    weight = PackedWeight(data, weight_scale, weight_zero_point, column_sum, group_scale, *sizes)
    static = _grid(static_scale, static_zero_point)
    functions = native.load().functions
    return calls.linears_from_float(functions, x, stages, [(weight, bias)], bits, symmetric, static, clip)


@linear_from_float.register_fake
def _(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
    bits: int,
    symmetric: bool,
    static_scale: Tensor | None,
    static_zero_point: Tensor | None,
    clip: float,
    data: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    column_sum: Tensor,
    group_scale: Tensor | None,
    weight_bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features), dtype=torch.float32)


def _grid(scale: Tensor | None, zero_point: Tensor | None) -> StaticGrid | None:
    return None if scale is None or zero_point is None else StaticGrid(scale, zero_point)
