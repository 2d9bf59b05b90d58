"""The kernels over Triton: the same functions as `reference`, for tensors on NVIDIA GPUs, and what only this backend has.

Triton comes with torch's CUDA builds for Linux and not with those for CPUs, so nothing here imports it before a kernel
runs. With TRITON_INTERPRET=1 set before the process starts, Triton's interpreter runs the same kernels on CPU tensors:
right and very slow, for tests alone.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from trdq_core.errors import BackendUnavailable, ShapeError
from trdq_core.kernels import triton_operators as operators
from trdq_core.kernels.capabilities import FIRST_FP8, FIRST_TRITON, capability_of
from trdq_core.kernels.packing import in_rows, pack_weight, to_rows, unpack_weight
from trdq_core.kernels.surroundings import apply_epilogue
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
    check_input,
    check_product,
    check_prologue,
)

__all__ = [
    "fp8_linear",
    "gelu_quantize",
    "interpreted",
    "layer_norm_quantize",
    "linear",
    "linear_from_float",
    "linears_from_float",
    "pack_weight",
    "quantize_activation",
    "quantize_fp8",
    "to_rows",
    "transform",
    "unavailable_reason",
    "unpack_weight",
]

MAX_IN_FEATURES = 33000  # 255 * 255 * in_features must fit an int32
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
_First = tuple[str, Tensor | None, Tensor | None, float]  # the prologue as the operators take it
_NO_PROLOGUE: _First = ("plain", None, None, 0.0)
_GELU: _First = ("gelu", None, None, 0.0)


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(device: torch.device) -> str | None:
    """One sentence saying why the Triton kernels cannot run on `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "The package triton is not installed; torch's CUDA builds for Linux bring it along."
    if interpreted() and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"The Triton kernels run on NVIDIA GPUs only, and the tensors are on {device}."
    capability = capability_of(device)
    if capability is None:
        return "torch sees no NVIDIA GPU that it can use."
    if capability < FIRST_TRITON:
        return f"Triton needs compute capability {_dotted(FIRST_TRITON)}, and this GPU has {_dotted(capability)}."
    return None


def transform(x: Tensor, stages: InputStages = NO_STAGES) -> Tensor:
    """T(x) for x of (..., in_features), same shape and dtype, computed in float32."""
    rows = _rows(x, stages)
    run = operators.transform if torch.compiler.is_compiling() else operators.compute_transform
    return run(rows, *stages).to(x.dtype).view(x.shape)


def quantize_activation(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
) -> QuantizedActivation:
    """Levels of T(x), as in `reference.quantize_activation`, but signed: int8, levels and zero point 128 lower."""
    return _quantize(x, stages, bits, symmetric, static, clip, _NO_PROLOGUE)


def gelu_quantize(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
) -> QuantizedActivation:
    """Signed levels of T(gelu(x)) in one pass, gelu in its tanh form: what the second linear of an MLP reads."""
    return _quantize(x, stages, bits, symmetric, static, clip, _GELU)


def layer_norm_quantize(
    x: Tensor,
    shift: Tensor,
    factor: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
    *,
    epsilon: float = 1e-6,
) -> QuantizedActivation:
    """Signed levels of T(layer_norm(x) (1 + factor) + shift) in one pass: adaLN of a DiT block and the linear's input.

    x is (batch, tokens, in_features); shift and factor are (batch, in_features) or (batch, 1, in_features); the
    LayerNorm has no weights of its own.
    """
    if x.dim() != 3 or shift.numel() != x.shape[0] * x.shape[2] or shift.shape != factor.shape:
        raise ShapeError(
            f"x is {tuple(x.shape)}, shift {tuple(shift.shape)} and factor {tuple(factor.shape)}; "
            "give (batch, tokens, channels) and twice (batch, channels)."
        )
    parts = (part.reshape(x.shape[0], x.shape[2]) for part in (shift, factor))
    return _quantize(x, stages, bits, symmetric, static, clip, _modulated_norm(*parts, epsilon))


def linear(
    activation: QuantizedActivation,
    weight: PackedWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(tokens, out_features) in `dtype` from signed levels and a weight in rows; see `reference.linear`."""
    _check_operands(activation.values, weight, bias)
    run = operators.linear if torch.compiler.is_compiling() else operators.compute_linear
    return run(*activation, *weight, bias, dtype)


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
    """(tokens, out_features) in x's dtype from x (..., in_features): `quantize_activation`, then `linear`."""
    return linear(quantize_activation(x, stages, bits, symmetric, static, clip), weight, bias, x.dtype)


def linears_from_float(
    x: Tensor,
    stages: InputStages,
    weights: Sequence[tuple[PackedWeight, Tensor | None]],
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """(tokens, sum of out_features) in x's dtype: x (..., in_features) quantized once, its products side by side.

    A prologue runs in the pass that quantizes, an epilogue where the products are written. Shift, scale, gate and what is
    added may be of half types; all is computed in float32 and rounded once. A graph of torch.compile has the epilogue and
    the joining as operators of its own.
    """
    check_input(x, stages)
    rows = x.reshape(-1, x.shape[-1])
    check_prologue(rows, prologue)
    first = _NO_PROLOGUE
    if prologue is not None and prologue.kind == "gelu":
        first = _GELU
    elif prologue is not None:
        first = _modulated_norm(prologue.shift, prologue.scale, prologue.epsilon)
    levels = _quantize(rows, stages, bits, symmetric, static, clip, first)
    for weight, bias in weights:
        _check_operands(levels.values, weight, bias)
    check_epilogue(len(rows), sum(weight.out_features for weight, _ in weights), epilogue)
    if not torch.compiler.is_compiling():
        return operators.compute_linears(levels, weights, x.dtype, epilogue)
    kept = x.dtype if epilogue is None else torch.float32
    parts = [operators.linear(*levels, *weight, bias, kept) for weight, bias in weights]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return (y if epilogue is None else apply_epilogue(y, epilogue)).to(x.dtype)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (rows, channels) as e4m3 and a float32 scale for each, absmax / 448: activations and weights alike."""
    rows = x.float()
    absmax = rows.abs().amax(1) if x.numel() else rows.new_zeros(rows.shape[0])
    scale = absmax.clamp_min(1e-12) / FP8_LARGEST
    return (rows / scale.unsqueeze(1)).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x * x_scale) (weight * weight_scale)^T + bias, (tokens, out_features) in `dtype`, for e4m3 rows and their scales.

    x is (tokens, in_features), weight (out_features, in_features). No recipe uses it: there is no fp8 format among them.
    """
    _check_device(x)
    capability = capability_of(x.device)
    if capability is not None and capability < FIRST_FP8:
        raise BackendUnavailable(
            f"fp8 products need compute capability {_dotted(FIRST_FP8)}, and this GPU has {_dotted(capability)}."
        )
    if x.dtype is not FP8 or weight.dtype is not FP8 or x.dim() != 2 or weight.shape[1:] != x.shape[1:]:
        raise ShapeError(
            f"x is {x.dtype} {tuple(x.shape)} and the weight {weight.dtype} {tuple(weight.shape)}; give {FP8} of "
            "shapes (tokens, in_features) and (out_features, in_features)."
        )
    run = operators.fp8_linear if torch.compiler.is_compiling() else operators.compute_fp8_linear
    return run(x, x_scale.float(), weight, weight_scale.float(), bias, dtype)


def _quantize(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None,
    clip: float,
    prologue: _First,
) -> QuantizedActivation:
    check_bits(bits)
    rows = _rows(x, stages)
    grid = (None, None) if static is None else static
    run = operators.quantize if torch.compiler.is_compiling() else operators.compute_quantize
    return QuantizedActivation(*run(rows, *stages, bits, symmetric, *grid, clip, *prologue))


def _modulated_norm(shift: Tensor, factor: Tensor, epsilon: float) -> _First:
    """Layer norm with shift and factor (items, channels), which the kernels want in rows alike."""
    if shift.shape != factor.shape:
        raise ShapeError(
            f"the norm's shift is {tuple(shift.shape)} and its scale {tuple(factor.shape)}; give one shape."
        )
    if shift.stride() != factor.stride() or shift.stride(1) != 1:
        shift, factor = shift.contiguous(), factor.contiguous()
    return "layer_norm", shift, factor, epsilon


def _rows(x: Tensor, stages: InputStages) -> Tensor:
    """x as (tokens, in_features) of a type that the kernels read, channels side by side."""
    check_input(x, stages)
    _check_device(x)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows.float() if rows.dtype is torch.float64 else rows
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_operands(values: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    check_product(values, weight, bias)
    _check_device(values)
    _check_device(weight.data)
    if not in_rows(weight):
        raise ShapeError("the weight lies in panels, which the CPU's kernels read; pass it through to_rows first.")
    if values.dtype is not torch.int8:
        raise ShapeError(f"the levels are {values.dtype}; the Triton kernels take signed ones, int8.")
    if weight.in_features > MAX_IN_FEATURES:
        raise ShapeError(f"in_features={weight.in_features} overflows the sums; at most {MAX_IN_FEATURES} can run.")


def _check_device(tensor: Tensor) -> None:
    if tensor.device.type != "cuda" and not interpreted():
        raise BackendUnavailable(
            f'the backend "triton" takes CUDA tensors, got one on {tensor.device}; use "cpp" or "torch" there.'
        )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
