"""The C++ library's three entry points, called with tensors; shapes are checked by the callers in `cpu`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.errors import ShapeError
from trdq_core.kernels.types import InputStages, PackedWeight, QuantizedActivation, StaticGrid

_STATUS = {1: "the C++ kernels refused the call", 2: "the C++ kernels could not get memory"}


def transform_rows(library: ctypes.CDLL, x: Tensor, stages: InputStages) -> Tensor:
    """T(x), (tokens, in_features) float32, for x of the same shape."""
    x, stages = _plain(x, torch.float32), _plain_stages(stages)
    y = torch.empty_like(x)
    status = library.trdq_transform(
        x.data_ptr(), x.shape[0], x.shape[1], *_stage_arguments(stages), y.data_ptr(), torch.get_num_threads()
    )
    if status:
        _refuse_stages(status, stages, x.shape[1])
    return y


def quantize_rows(
    library: ctypes.CDLL,
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None,
    clip: float = 1.0,
) -> QuantizedActivation:
    """Levels of T(x) for x of (tokens, in_features)."""
    x, stages = _plain(x, torch.float32), _plain_stages(stages)
    tokens, width = x.shape
    values = torch.empty((tokens, width), dtype=torch.uint8)
    scale = torch.empty(tokens, dtype=torch.float32)
    zero_point = torch.empty(tokens, dtype=torch.float32)
    row_sum = torch.empty(tokens, dtype=torch.int32)
    grid = (None, None) if static is None else (static.scale.float(), static.zero_point.float())
    status = library.trdq_quantize(
        x.data_ptr(),
        tokens,
        width,
        *_stage_arguments(stages),
        bits,
        symmetric,
        _pointer(grid[0]),
        _pointer(grid[1]),
        clip,
        values.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        row_sum.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        _refuse_stages(status, stages, width)
    return QuantizedActivation(values, scale, zero_point, row_sum)


def product(library: ctypes.CDLL, activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """The scaled product, (tokens, out_features) float32; the sizes must be ones that the panels can take."""
    values, a_scale, a_zero, a_sum = activation
    values = _plain(values, torch.uint8)
    if values.shape[1] % 4:
        values = functional.pad(values, (0, -values.shape[1] % 4))
    a_scale, a_zero = _plain(a_scale, torch.float32), _plain(a_zero, torch.float32)
    a_sum = _plain(a_sum, torch.int32)
    weight, bias = _plain_weight(weight), _maybe_plain(bias, torch.float32)
    tokens, lda = values.shape
    y = torch.empty((tokens, weight.out_features), dtype=torch.float32)
    status = library.trdq_linear(
        values.data_ptr(),
        lda,
        a_scale.data_ptr(),
        a_zero.data_ptr(),
        a_sum.data_ptr(),
        tokens,
        weight.in_features,
        weight.out_features,
        *_weight_arguments(weight),
        _pointer(bias),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError(f"{_STATUS[status]} of {tokens} tokens with {tuple(weight.data.shape)} weights.")
    return y


def linear_from_float(
    library: ctypes.CDLL,
    x: Tensor,
    stages: InputStages,
    weight: PackedWeight,
    bias: Tensor | None,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None,
    clip: float = 1.0,
) -> Tensor:
    """(tokens, out_features) float32 for x of (tokens, in_features): both steps in one call, no levels allocated."""
    x, stages = _plain(x, torch.float32), _plain_stages(stages)
    weight, bias = _plain_weight(weight), _maybe_plain(bias, torch.float32)
    grid = (None, None) if static is None else (static.scale.float(), static.zero_point.float())
    y = torch.empty((x.shape[0], weight.out_features), dtype=torch.float32)
    status = library.trdq_linear_from_float(
        x.data_ptr(),
        x.shape[0],
        weight.in_features,
        *_stage_arguments(stages),
        bits,
        symmetric,
        _pointer(grid[0]),
        _pointer(grid[1]),
        clip,
        weight.out_features,
        *_weight_arguments(weight),
        _pointer(bias),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        _refuse_stages(status, stages, weight.in_features)
    return y


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _maybe_plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _plain(tensor, dtype)


def _plain_stages(stages: InputStages) -> InputStages:
    inverse_scale, rotation, permutation, block, second_rotation = stages
    if inverse_scale is rotation is permutation is second_rotation is None:
        return stages
    return InputStages(
        _maybe_plain(inverse_scale, torch.float32),
        _maybe_plain(rotation, torch.float32),
        _maybe_plain(permutation, torch.int32),
        block,
        _maybe_plain(second_rotation, torch.float32),
    )


def _plain_weight(weight: PackedWeight) -> PackedWeight:
    """The same weight with tensors that the library can read; a module cast with .half() casts its scales too."""
    data, scale, zero_point, column_sum, group_scale, *sizes = weight
    parts = (
        data if data.is_contiguous() else data.contiguous(),
        _plain(scale, torch.float32),
        _maybe_plain(zero_point, torch.float32),
        _plain(column_sum, torch.float32),
        _maybe_plain(group_scale, torch.int8),
    )
    same = all(part is own for part, own in zip(parts, weight, strict=False))
    return weight if same else PackedWeight(*parts, *sizes)


def _weight_arguments(weight: PackedWeight) -> tuple[int | None, ...]:
    return (
        weight.data.data_ptr(),
        weight.bits,
        _pointer(weight.group_scale),
        weight.group_size,
        weight.scale.data_ptr(),
        _pointer(weight.zero_point),
        weight.column_sum.data_ptr(),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stage_arguments(stages: InputStages) -> tuple[int | None, ...]:
    inverse_scale, first, permutation, block, second = stages
    return (
        _pointer(inverse_scale),
        _pointer(first),
        0 if first is None else first.shape[0],
        _pointer(permutation),
        block,
        _pointer(second),
        0 if second is None else second.shape[0],
    )


def _refuse_stages(status: int, stages: InputStages, width: int) -> None:
    """Raises for a failed call. The shapes were checked before, so a refusal means an index outside the row."""
    if status == 1 and stages.permutation is not None:
        low, high = int(stages.permutation.min()), int(stages.permutation.max())
        raise ShapeError(f"permutation holds {low}..{high}; {width} channels need indices 0..{width - 1}.")
    raise RuntimeError(f"{_STATUS[status]}.")
