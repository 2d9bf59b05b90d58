"""The kernels over the C++ library: the same functions as `reference`, for float tensors on the CPU.

Eager calls go straight to the library by ctypes; the dispatcher of a custom operator costs more than a small layer's
quantization. Under torch.compile the same calls become `torch.ops.trdq.*`, which `operators` registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trdq_core.errors import BackendUnavailable, ShapeError
from trdq_core.kernels import calls, native, operators, torch_eager
from trdq_core.kernels.native import unavailable_reason
from trdq_core.kernels.packing import in_rows, pack_weight, unpack_weight
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

__all__ = [
    "fits_panels",
    "linear",
    "pack_weight",
    "quantize_activation",
    "transform",
    "unavailable_reason",
    "unpack_weight",
]

# 255 * 255 * in_features must fit an int32; see kMaxDepth in csrc/api.cpp.
MAX_IN_FEATURES = 33000


def transform(x: Tensor, stages: InputStages = NO_STAGES) -> Tensor:
    """T(x) for x of (..., in_features), same shape and dtype, computed in float32."""
    rows = _rows(x, stages)
    if torch.compiler.is_compiling():
        y = operators.transform(rows, *stages)
    else:
        y = calls.transform_rows(native.load().functions, rows, stages)
    return y.view(x.shape).to(x.dtype)


def quantize_activation(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
) -> QuantizedActivation:
    """Levels of T(x), as in `reference.quantize_activation`, in one pass over tiles of rows."""
    check_bits(bits)
    rows = _rows(x, stages)
    if torch.compiler.is_compiling():
        grid = (None, None) if static is None else static
        return QuantizedActivation(*operators.quantize_activation(rows, *stages, bits, symmetric, *grid, clip))
    return calls.quantize_rows(native.load().functions, rows, stages, bits, symmetric, static, clip)


def linear(activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """(tokens, out_features) float32 from levels and packed weight; see `reference.linear` for the formula."""
    check_product(activation.values, weight, bias)
    _check_cpu(activation.values)
    _check_panels(weight)
    if not fits_panels(weight.in_features, weight.group_size):  # such sizes run right, only slower
        return torch_eager.linear(activation, weight, bias)
    if torch.compiler.is_compiling():
        return operators.linear(*activation, *weight, bias)
    return calls.product(native.load().functions, activation, weight, bias)


def linear_from_float(
    x: Tensor,
    stages: InputStages,
    weight: PackedWeight,
    bias: Tensor | None,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
) -> Tensor:
    """(tokens, out_features) float32 from x (..., in_features): `quantize_activation` and `linear` in one call."""
    if not fits_panels(weight.in_features, weight.group_size):
        return linear(quantize_activation(x, stages, bits, symmetric, static, clip), weight, bias)
    check_bits(bits)
    rows = _rows(x, stages)
    check_product(rows, weight, bias)
    _check_panels(weight)
    if torch.compiler.is_compiling():
        grid = (None, None) if static is None else static
        return operators.linear_from_float(rows, *stages, bits, symmetric, *grid, clip, *weight, bias)
    return calls.linear_from_float(native.load().functions, rows, stages, weight, bias, bits, symmetric, static, clip)


def fits_panels(in_features: int, group_size: int) -> bool:
    """Whether the library's product takes such a weight; others run through torch, right but slower."""
    return group_size % 8 == 0 and 0 < in_features <= MAX_IN_FEATURES


def _rows(x: Tensor, stages: InputStages) -> Tensor:
    check_input(x, stages)
    _check_cpu(x)
    return x.reshape(-1, x.shape[-1]).float()


def _check_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise BackendUnavailable(f'the backend "cpp" takes CPU tensors, got one on {tensor.device}; use "torch" there.')


def _check_panels(weight: PackedWeight) -> None:
    _check_cpu(weight.data)
    if in_rows(weight):
        raise ShapeError(
            "the weight lies in rows, which the GPU kernels read; pass it through packing.to_panels first."
        )
