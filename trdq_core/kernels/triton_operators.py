"""The Triton kernels as operators `torch.ops.trdq.triton_*`, with shape functions, for torch.compile and CUDA graphs.

None of them waits for the GPU or lets a shape depend on data. Triton is imported when one first runs, not before. Each is
made of a function compute_*, which eager calls take directly: torch's dispatcher costs more than a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trdq_core.kernels.types import Epilogue, InputStages, PackedWeight, QuantizedActivation, StaticGrid

DEVICES = ("cuda", "cpu")  # the CPU for Triton's interpreter


def compute_transform(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
) -> Tensor:
    """T(x) in the dtype of x, (tokens, in_features); the stages of `InputStages`, one by one."""
    from trdq_core.kernels import triton_launch

    stages = InputStages(inverse_scale, rotation, permutation, hadamard_block, second_rotation)
    return triton_launch.transform_rows(x, stages, x.dtype)


transform = torch.library.custom_op("trdq::triton_transform", compute_transform, mutates_args=(), device_types=DEVICES)


@transform.register_fake
def _(
    x: Tensor,
    inverse_scale: Tensor | None,
    rotation: Tensor | None,
    permutation: Tensor | None,
    hadamard_block: int,
    second_rotation: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape)


def compute_quantize(
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
    prologue: str,
    shift: Tensor | None,
    factor: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, scale, zero_point and row_sum of T(prologue(x)) for x of (tokens, in_features)."""
    from trdq_core.kernels import triton_launch

    stages = InputStages(inverse_scale, rotation, permutation, hadamard_block, second_rotation)
    static = None if static_scale is None else StaticGrid(static_scale, static_zero_point)
    first = triton_launch.Prologue(prologue, shift, factor, epsilon)
    return tuple(triton_launch.quantize_rows(x, stages, bits, symmetric, static, clip, first))


quantize = torch.library.custom_op("trdq::triton_quantize", compute_quantize, mutates_args=(), device_types=DEVICES)


@quantize.register_fake
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
    prologue: str,
    shift: Tensor | None,
    factor: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((tokens,), dtype=torch.float32),
        x.new_empty((tokens,), dtype=torch.float32),
        x.new_empty((tokens,), dtype=torch.int32),
    )


def compute_linear(
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
    dtype: torch.dtype,
) -> Tensor:
    """(tokens, out_features) in `dtype`; the fields of `QuantizedActivation`, then those of `PackedWeight`, the bias."""
    from trdq_core.kernels import triton_launch

    sizes = (bits, group_size, in_features, out_features)
    weight = PackedWeight(data, weight_scale, weight_zero_point, column_sum, group_scale, *sizes)
    y = torch.empty((values.shape[0], out_features), dtype=dtype, device=values.device)
    levels = QuantizedActivation(values, scale, zero_point, row_sum)
    triton_launch.product(levels, weight, bias, triton_launch.Around(y))
    return y


def compute_linears(
    levels: QuantizedActivation,
    weights: Sequence[tuple[PackedWeight, Tensor | None]],
    dtype: torch.dtype,
    epilogue: Epilogue | None,
) -> Tensor:
    """(tokens, sum of out_features) in `dtype`: products side by side, each written where it belongs. No operator."""
    from trdq_core.kernels import triton_launch

    widths = [weight.out_features for weight, _ in weights]
    y = torch.empty((levels.values.shape[0], sum(widths)), dtype=dtype, device=levels.values.device)
    added, gate = (None, None) if epilogue is None else epilogue
    if added is not None and added.stride() != y.stride():
        added = added.contiguous()
    if gate is not None and gate.stride(1) != 1:
        gate = gate.contiguous()
    begin = 0
    for (weight, bias), width in zip(weights, widths, strict=True):
        columns = slice(begin, begin + width)
        parts = (None if part is None else part[:, columns] for part in (added, gate))
        triton_launch.product(levels, weight, bias, triton_launch.Around(y[:, columns], *parts))
        begin += width
    return y


linear = torch.library.custom_op("trdq::triton_linear", compute_linear, mutates_args=(), device_types=DEVICES)


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
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty((values.shape[0], out_features), dtype=dtype)


def compute_fp8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(tokens, out_features) in `dtype` from e4m3 rows of input and weight with a scale each."""
    from trdq_core.kernels import triton_launch

    return triton_launch.fp8_product(x, x_scale, weight, weight_scale, bias, dtype)


fp8_linear = torch.library.custom_op(
    "trdq::triton_fp8_linear", compute_fp8_linear, mutates_args=(), device_types=DEVICES
)


@fp8_linear.register_fake
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
