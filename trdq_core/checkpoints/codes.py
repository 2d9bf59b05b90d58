"""The integers of weights as files hold them: in the layout of the CPU's kernels, or without a gap where bits would be lost.

Kernels read bytes or nibbles, so weights of 2, 3, 5, 6 and 7 bits take 4 or 8 in memory. Since version 2 of the format files
hold these as codes without a gap, the integer plus 2^(bits-1), row by row. Switched sets stay as kernels read them, since
they are used where they lie in the file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trdq_core.errors import CheckpointError
from trdq_core.kernels.packing import to_panels, unpack_weight
from trdq_core.kernels.types import PackedWeight, packed_shape
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.stored_weights import pack, storage_bits
from trdq_core.numerics.packing import pack_bits, packed_size, unpack_bits
from trdq_core.weights.stored import QuantizedWeight

TIGHT_VERSION = 2  # of the format
DATA = "qweight"  # the buffer they are in
_AT_ONCE = 1 << 22  # codes that are packed together; each takes 8 bytes while it is


def takes_less(bits: int) -> bool:
    """Whether a file holds integers of `bits` in fewer bytes than kernels read."""
    return storage_bits(bits) != bits


def tight_shape(layer: QuantizedLinear) -> tuple[int, int]:
    """Sets and bytes of a layer's integers without a gap."""
    return layer.sets, packed_size(layer.out_features * layer.in_features, layer.weight_bits)


def to_file(layer: QuantizedLinear, data: Tensor, *, tight: bool) -> Tensor:
    """What a file holds for the integers `data` (sets, ...) of `layer`, which may lie in the layout of any kernel."""
    if not tight and data.is_meta:
        sizes = packed_shape(layer.storage_bits, layer.in_features, layer.out_features)
        return torch.empty((len(data), *sizes), dtype=data.dtype, device="meta")
    if not tight:
        return torch.stack([to_panels(_packed(layer, one)).data for one in data]) if data.dim() == 3 else data
    size = (len(data), tight_shape(layer)[1])
    if data.is_meta:
        return torch.empty(size, dtype=torch.uint8, device="meta")
    found = torch.empty(size, dtype=torch.uint8)
    for index, one in enumerate(data):
        values, end = unpack_weight(_packed(layer, one.cpu())), 0
        for part in values.view(-1).split(_AT_ONCE):  # a multiple of 8 codes ends at a byte's border
            codes = pack_bits(part.to(torch.int16) + 2 ** (layer.weight_bits - 1), layer.weight_bits)
            found[index, end : end + len(codes)] = codes
            end += len(codes)
    return found


def from_file(layer: QuantizedLinear, data: Tensor) -> Tensor:
    """The integers of `layer` as its kernels read them, from what `to_file` made."""
    if data.dim() != 2:
        return data
    unpacked = []
    for one in data:
        values = integers(one, layer.weight_bits, layer.out_features, layer.in_features)
        weight = QuantizedWeight(values, torch.zeros(layer.out_features), None, None, 0, layer.weight_bits)
        unpacked.append(pack(weight, "reference").data)
    return torch.stack(unpacked)


def integers(data: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """The weight (out, in) int8 of one set of what a file holds, before any group scale."""
    if data.dim() != 1:
        nothing = torch.empty(0)
        sizes = (storage_bits(bits), 0, in_features, out_features)
        return unpack_weight(PackedWeight(data, nothing, None, nothing, None, *sizes))
    count, begin, parts = out_features * in_features, 0, []
    while begin < count:
        here = min(_AT_ONCE, count - begin)
        first = begin * bits // 8
        codes = unpack_bits(data[first : first + packed_size(here, bits)], bits, here)
        parts.append((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8))
        begin += here
    return torch.cat(parts).view(out_features, in_features)


def check_sums(name: str, values: Tensor, sums: Tensor, group_scale: Tensor | None) -> None:
    """CheckpointError unless `sums` (out,) add up the integers (out, in), times the scales of their groups (out, groups).

    A wrong sum shifts every output of its channel, and no checksum of the file tells of one that was saved so.
    """
    if group_scale is not None:
        groups = values.unflatten(1, (group_scale.shape[1], -1)).sum(2, dtype=torch.int32)
        found = (groups * group_scale).sum(1, dtype=torch.int32)
    else:
        found = values.sum(1, dtype=torch.int32)
    if not torch.equal(found.float(), sums):
        raise CheckpointError(f"{name:.100}: it is not the sum of the layer's integers; copy the file again.")


def _packed(layer: QuantizedLinear, data: Tensor) -> PackedWeight:
    nothing = torch.empty(0)
    return PackedWeight(
        data, nothing, None, nothing, None, layer.storage_bits, 0, layer.in_features, layer.out_features
    )
