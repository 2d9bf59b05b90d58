"""Weights of all sets as the buffers of a layer, and back: packed for the integer kernels, or as bit-packed codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trdq_core.kernels import dispatch, packing
from trdq_core.kernels.types import PackedWeight
from trdq_core.numerics.packing import pack_bits, unpack_bits
from trdq_core.weights.rounding import CodedWeight, QuantizedWeight, Weight, dequantize_weight

PACKED_FIELDS = {
    "qweight": "data", "weight_scale": "scale", "weight_zero_point": "zero_point", "column_sum": "column_sum",
    "group_scale": "group_scale",
}  # fmt: skip
CODED_FIELDS = ("weight_scale", "weight_zero_point", "group_scale", "code_parameters")


def storage_bits(bits: int) -> int:
    """What the integer kernels hold a weight of `bits` in: nibbles up to 4 bits, else bytes."""
    return 4 if bits <= 4 else 8


def pack(weight: QuantizedWeight, backend: dispatch.Backend | None = None) -> PackedWeight:
    """Integer weights in the layout that the matrix products of `backend` read."""
    return dispatch.pack_weight(
        weight.values,
        weight.scale,
        zero_point=weight.zero_point,
        group_scale=weight.group_scale,
        bits=storage_bits(weight.bits),
        backend=backend,
    )


def in_layout(data: Tensor, bits: int, in_features: int, out_features: int, *, rows: bool) -> Tensor:
    """Packed data (sets, ...) in rows or in panels; the tensor itself where it lies so."""
    if (data.dim() == 3) == rows:
        return data
    change = packing.to_rows if rows else packing.to_panels
    sizes = (bits, 0, in_features, out_features)
    nothing = data.new_empty(0)  # scales are the same in both
    return torch.stack([change(PackedWeight(one, nothing, None, nothing, None, *sizes)).data for one in data])


def packed_buffers(weights: Sequence[PackedWeight]) -> dict[str, Tensor | None]:
    """The fields of all sets, stacked: (sets, ...)."""
    return {name: _stack([getattr(weight, field) for weight in weights]) for name, field in PACKED_FIELDS.items()}


def coded_buffers(weights: Sequence[Weight]) -> dict[str, Tensor | None]:
    """Bit-packed codes (sets, bytes) and the parameters that read them; for products in floating point."""
    first = weights[0]
    if isinstance(first, QuantizedWeight):
        half = 2 ** (first.bits - 1)
        codes = [(weight.values.to(torch.int16) + half).to(torch.uint8) for weight in weights]
        parts = {
            "weight_scale": [weight.scale for weight in weights],
            "weight_zero_point": [weight.zero_point for weight in weights],
            "group_scale": [weight.group_scale for weight in weights],
        }
    else:
        codes, parts = (
            [weight.codes for weight in weights],
            {"code_parameters": [weight.parameters for weight in weights]},
        )
    packed = torch.stack([pack_bits(code.reshape(-1), first.bits) for code in codes])
    return {"codes": packed, **{name: _stack(part) for name, part in parts.items()}}


def dense_weight(buffers: Mapping[str, Tensor | None], index: int, like: Weight) -> Tensor:
    """The weight (out, in) fp32 that the coded buffers of one set stand for; `like` tells its kind and sizes."""
    part = {name: None if tensor is None else tensor[index] for name, tensor in buffers.items()}
    shape = like.values.shape if isinstance(like, QuantizedWeight) else like.codes.shape
    codes = unpack_bits(part["codes"], like.bits, shape[0] * shape[1]).view(shape)
    if isinstance(like, CodedWeight):
        weight: Weight = like._replace(codes=codes, parameters=part["code_parameters"])
    else:
        values = (codes.to(torch.int16) - 2 ** (like.bits - 1)).to(torch.int8)
        weight = like._replace(
            values=values, scale=part["weight_scale"], zero_point=part["weight_zero_point"],
            group_scale=part["group_scale"],
        )  # fmt: skip
    return dequantize_weight(weight, torch.float32)


def shape_only(weight: Weight) -> Weight:
    """The weight without its numbers: kind and sizes on the meta device."""
    return weight._replace(**{name: value.to("meta") for name, value in weight._asdict().items() if _is_tensor(value)})


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.stack([part for part in parts if part is not None])
