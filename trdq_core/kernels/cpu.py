"""The kernels over the C++ library: the same functions as `reference`, for float tensors on the CPU.

Eager calls go straight to the library by ctypes; the dispatcher of a custom operator costs more than a small layer's
quantization. Under torch.compile the same calls become `torch.ops.trdq.*`, which `operators` registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trdq_core.errors import BackendUnavailable, ShapeError
from trdq_core.kernels import calls, native, operators, torch_eager
from trdq_core.kernels.native import unavailable_reason
from trdq_core.kernels.packing import in_rows, pack_weight, unpack_weight
from trdq_core.kernels.surroundings import added_to_scores, apply_epilogue, apply_prologue
from trdq_core.kernels.types import (
    NO_STAGES,
    Epilogue,
    InputStages,
    PackedWeight,
    Prologue,
    QuantizedActivation,
    StaticGrid,
    check_bits,
    check_epilogue,
    check_heads,
    check_input,
    check_product,
    check_prologue,
)

__all__ = [
    "attend",
    "fits_panels",
    "linear",
    "linear_from_float",
    "linears_from_float",
    "pack_weight",
    "quantize_activation",
    "transform",
    "unavailable_reason",
    "unpack_weight",
]

# 255 * 255 * in_features must fit an int32; see kMaxDepth in csrc/api.cpp.
MAX_IN_FEATURES = 33000


def transform(x: Tensor, stages: InputStages = NO_STAGES, prologue: Prologue | None = None) -> Tensor:
    """T(x) for x of (..., in_features), same shape and dtype, computed in float32."""
    rows, prologue = _prepared(x, stages, prologue)
    if torch.compiler.is_compiling():
        y = operators.transform(rows, *stages)
    else:
        y = calls.transform_rows(native.load().functions, rows, stages, prologue)
    return y.view(x.shape).to(x.dtype)


def quantize_activation(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
    prologue: Prologue | None = None,
) -> QuantizedActivation:
    """Levels of T(x), as in `reference.quantize_activation`, in one pass over tiles of rows."""
    check_bits(bits)
    rows, prologue = _prepared(x, stages, prologue)
    if torch.compiler.is_compiling():
        grid = (None, None) if static is None else static
        return QuantizedActivation(*operators.quantize_activation(rows, *stages, bits, symmetric, *grid, clip))
    return calls.quantize_rows(native.load().functions, rows, stages, bits, symmetric, static, clip, prologue)


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
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """(tokens, out_features) float32 from x (..., in_features): `quantize_activation` and `linear` in one call."""
    return linears_from_float(x, stages, [(weight, bias)], bits, symmetric, static, clip, prologue, epilogue)


def linears_from_float(
    x: Tensor,
    stages: InputStages,
    weights: Sequence[calls.Biased],
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """The same for weights that read one input, their products side by side: (tokens, sum of out_features) float32."""
    check_bits(bits)
    rows, prologue = _prepared(x, stages, prologue)
    for weight, bias in weights:
        check_product(rows, weight, bias)
        _check_panels(weight)
    check_epilogue(rows.shape[0], sum(weight.out_features for weight, _ in weights), epilogue)
    if torch.compiler.is_compiling():
        parts = [_compiled(rows, stages, weight, bias, bits, symmetric, static, clip) for weight, bias in weights]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if epilogue is None else apply_epilogue(y, epilogue)
    grid = (bits, symmetric, static, clip)
    if all(fits_panels(weight.in_features, weight.group_size) for weight, _ in weights):
        return calls.linears_from_float(native.load().functions, rows, stages, weights, *grid, prologue, epilogue)
    levels = quantize_activation(rows, stages, *grid, prologue)
    y = torch.cat([linear(levels, weight, bias) for weight, bias in weights], 1)
    return y if epilogue is None else apply_epilogue(y, epilogue)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, bits: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(width) + mask) v, (items, rows, heads * width) float32; see `calls.attend`.

    The mask is added, or one of bool where True takes part. A row that sees no key is 0; what is not finite stays so.
    """
    for part in (q, k, v) if mask is None else (q, k, v, mask):
        _check_cpu(part)
    check_heads(q, k, v, heads, mask)
    mask = None if mask is None else added_to_scores(mask, torch.float32)
    return calls.attend(native.load().functions, q, k, v, heads, mask, bits)


def _compiled(
    rows: Tensor,
    stages: InputStages,
    weight: PackedWeight,
    bias: Tensor | None,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None,
    clip: float,
) -> Tensor:
    if not fits_panels(weight.in_features, weight.group_size):
        return linear(quantize_activation(rows, stages, bits, symmetric, static, clip), weight, bias)
    grid = (None, None) if static is None else static
    return operators.linear_from_float(rows, *stages, bits, symmetric, *grid, clip, *weight, bias)


def fits_panels(in_features: int, group_size: int) -> bool:
    """Whether the library's product takes such a weight; others run through torch, right but slower."""
    return group_size % 8 == 0 and 0 < in_features <= MAX_IN_FEATURES


def _prepared(x: Tensor, stages: InputStages, prologue: Prologue | None) -> tuple[Tensor, Prologue | None]:
    """The rows of x (tokens, in_features) float32, checked. A graph of torch.compile fuses a prologue by itself."""
    check_input(x, stages)
    _check_cpu(x)
    rows = x.reshape(-1, x.shape[-1]).float()
    check_prologue(rows, prologue)
    if prologue is not None and torch.compiler.is_compiling():
        return apply_prologue(rows, prologue), None
    return rows, prologue


def _check_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise BackendUnavailable(f'the backend "cpp" takes CPU tensors, got one on {tensor.device}; use "torch" there.')


def _check_panels(weight: PackedWeight) -> None:
    _check_cpu(weight.data)
    if in_rows(weight):
        raise ShapeError(
            "the weight lies in rows, which the GPU kernels read; pass it through packing.to_panels first."
        )
