"""The kernels as eager torch calls, for machines where the C++ library does not run.

The product is `torch._int_mm` where that is a vector kernel, and a float32 matmul of dequantized numbers elsewhere:
on CPUs without VNNI `_int_mm` is a plain loop, hundreds of times slower than float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.kernels import capabilities
from trdq_core.kernels.packing import folded_weight, pack_weight, unpack_weight
from trdq_core.kernels.reference import apply_stages, quantize_rows
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
    "has_integer_product",
    "linear",
    "pack_weight",
    "quantize_activation",
    "transform",
    "unpack_weight",
]


def transform(x: Tensor, stages: InputStages = NO_STAGES) -> Tensor:
    """T(x) for x of (..., in_features), same shape and dtype, computed in float32."""
    check_input(x, stages)
    return apply_stages(x.float(), stages).to(x.dtype)


def quantize_activation(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
) -> QuantizedActivation:
    """Levels of T(x), as in `reference.quantize_activation`, with T in float32."""
    check_bits(bits)
    check_input(x, stages)
    rows = x.reshape(-1, x.shape[-1]).float()
    return quantize_rows(apply_stages(rows, stages), bits, symmetric, static, clip)


def has_integer_product(device: torch.device, in_features: int = 0, out_features: int = 0, tokens: int = 32) -> bool:
    """True where `torch._int_mm` is a fast kernel for these sizes; on CUDA it wants tokens > 16 and multiples of 8."""
    if device.type == "cuda":
        return _gpu_has_int8() and tokens > 16 and in_features % 8 == 0 and out_features % 8 == 0
    return device.type == "cpu" and _cpu_has_int8()


# Constants under torch.compile, which otherwise ends its graph at either question.
@torch.compiler.assume_constant_result
def _cpu_has_int8() -> bool:
    return torch.cpu._is_vnni_supported()


@torch.compiler.assume_constant_result
def _gpu_has_int8() -> bool:
    return capabilities.support(capabilities.capability_of(torch.device("cuda"))).int8 != "simulated"


def linear(activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """(tokens, out_features) float32 from levels and packed weight; see `reference.linear` for the formula."""
    check_product(activation.values, weight, bias)
    values = activation.values
    tokens, in_features = values.shape
    integer = has_integer_product(values.device, in_features, weight.out_features, tokens)
    if integer and tokens and in_features and weight.out_features:
        return _integer_linear(activation, weight, bias)
    return _dequantized_linear(activation, weight, bias)


def _integer_linear(activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    # Levels minus 128 as signed bytes: symmetric activations then need no correction (zero = 0).
    values, zero = activation.values, activation.zero_point
    if values.dtype is torch.uint8:
        values, zero = values.view(torch.int8) ^ -128, zero - 128.0
    y = torch._int_mm(values, folded_weight(weight).t()).float()
    y = torch.addr(y, zero, weight.column_sum, alpha=-1)
    if weight.zero_point is not None:
        centred = activation.row_sum - weight.in_features * activation.zero_point
        y = torch.addr(y, centred, weight.zero_point, alpha=-1)
    y = y * activation.scale.unsqueeze(1) * weight.scale
    return y if bias is None else y + bias.float()


def _dequantized_linear(activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    # Scales go on the result, not on the weight: one pass less over the larger of the two.
    x = activation.values.float() - activation.zero_point.unsqueeze(1)
    w = folded_weight(weight).float()
    if weight.zero_point is not None:
        w -= weight.zero_point.unsqueeze(1)
    y = functional.linear(x, w) * activation.scale.unsqueeze(1) * weight.scale
    return y if bias is None else y + bias.float()
