"""Weights to panels and back, in plain torch; every backend on the CPU shares this one layout.

One panel holds 64 output columns. Inside it, four neighbouring input channels of a column lie side by side, because
the dot-product instruction takes them as one 32-bit lane:

    8 bits   [panel][k/4][column][k%4]          one byte each
    4 bits   [panel][k/8][column][k%4]          low nibble: first four channels of the eight, high nibble: last four

GPU kernels read another layout, rows: the channels of one output follow each other, as matrix units want both operands.

    8 bits   [column][k]                        one byte each
    4 bits   [column][k/128][k%64]              two's complement; low nibble: first 64 channels of the 128, high: last 64

Channels past the last chunk are zeros there. Only `data` differs; scales, zero points and sums are the same in both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.errors import ShapeError
from trdq_core.kernels.types import CHUNK, PANEL, PackedWeight

NIBBLE_OFFSET = 8
GROUP_SCALE_RANGE = (1, 16)


def pack_weight(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    group_scale: Tensor | None = None,
    bits: int = 8,
) -> PackedWeight:
    """The packed form of integer weights q, int8 (out_features, in_features).

    bits up to 4 are stored as nibbles (q in -8..7), 5 to 8 as bytes. scale and zero_point are (out_features,),
    group_scale is (out_features, groups) in 1..16 and goes with nibbles only. ShapeError names what does not fit.
    """
    _check_weight(q, scale, zero_point, group_scale, bits)
    out_features, in_features = q.shape
    storage = 4 if bits <= 4 else 8
    folded = q.to(torch.int32)
    if group_scale is not None:
        folded = folded * group_scale.to(torch.int32).repeat_interleave(in_features // group_scale.shape[1], dim=1)
    return PackedWeight(
        data=_pack_nibbles(q) if storage == 4 else _pack_bytes(q),
        scale=scale.to(torch.float32).contiguous(),
        zero_point=None if zero_point is None else zero_point.to(torch.float32).contiguous(),
        column_sum=folded.sum(dim=1).to(torch.float32),
        group_scale=None if group_scale is None else group_scale.to(torch.int8).contiguous(),
        bits=storage,
        group_size=0 if group_scale is None else in_features // group_scale.shape[1],
        in_features=in_features,
        out_features=out_features,
    )


def unpack_weight(packed: PackedWeight) -> Tensor:
    """The integers given to `pack_weight`: int8 (out_features, in_features), before any group scale."""
    data = packed.data
    if in_rows(packed):
        return _unpack_rows(packed)
    if packed.bits == 4:
        pairs = torch.stack((data & 15, data >> 4), dim=2)  # (panels, k/8, 2, 64, 4)
        data = pairs.view(torch.int8).sub_(NIBBLE_OFFSET).flatten(1, 2)
    rows = data.transpose(1, 2).reshape(data.shape[0] * PANEL, -1)
    return rows[: packed.out_features, : packed.in_features].contiguous()


def in_rows(packed: PackedWeight) -> bool:
    """Whether the weight lies in rows, the layout of the GPU kernels."""
    return packed.data.dim() == 2


def to_rows(packed: PackedWeight) -> PackedWeight:
    """The same weight in rows, for the GPU kernels; as it is if it lies so already."""
    if in_rows(packed):
        return packed
    q = unpack_weight(packed)
    return packed._replace(data=_row_nibbles(q) if packed.bits == 4 else q)


def to_panels(packed: PackedWeight) -> PackedWeight:
    """The same weight in panels, for the kernels on the CPU; as it is if it lies so already."""
    if not in_rows(packed):
        return packed
    q = unpack_weight(packed)
    return packed._replace(data=_pack_nibbles(q) if packed.bits == 4 else _pack_bytes(q))


def folded_weight(packed: PackedWeight) -> Tensor:
    """The integers that the product uses: int8 (out_features, in_features), group scale multiplied in."""
    q = unpack_weight(packed)
    if packed.group_scale is None:
        return q
    return (q.unflatten(1, (-1, packed.group_size)) * packed.group_scale.unsqueeze(2)).flatten(1)


def _pack_bytes(q: Tensor) -> Tensor:
    out_features, in_features = q.shape
    padded = functional.pad(q, (0, -in_features % 4, 0, -out_features % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()


def _pack_nibbles(q: Tensor) -> Tensor:
    out_features, in_features = q.shape
    padded = functional.pad(q, (0, -in_features % 8, 0, -out_features % PANEL)) + NIBBLE_OFFSET
    quads = padded.view(torch.uint8).view(-1, PANEL, padded.shape[1] // 8, 2, 4)
    return (quads[:, :, :, 0] | (quads[:, :, :, 1] << 4)).transpose(1, 2).contiguous()


def _row_nibbles(q: Tensor) -> Tensor:
    halves = functional.pad(q, (0, -q.shape[1] % CHUNK)).view(torch.uint8).unflatten(1, (-1, 2, CHUNK // 2))
    return ((halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)).flatten(1).contiguous()


def _unpack_rows(packed: PackedWeight) -> Tensor:
    if packed.bits == 8:
        return packed.data
    low = (packed.data << 4).view(torch.int8) >> 4  # shifting an int8 right keeps its sign
    high = packed.data.view(torch.int8) >> 4
    halves = [half.unflatten(1, (-1, CHUNK // 2)) for half in (low, high)]
    return torch.stack(halves, dim=2).flatten(1)[:, : packed.in_features].contiguous()


def _check_weight(q: Tensor, scale: Tensor, zero_point: Tensor | None, group_scale: Tensor | None, bits: int) -> None:
    if q.dtype is not torch.int8 or q.dim() != 2:
        raise ShapeError(f"the weight is {q.dtype} {tuple(q.shape)}; give int8 of shape (out_features, in_features).")
    if not 2 <= bits <= 8:
        raise ShapeError(f"weight bits={bits} cannot be packed; use 2 to 8.")
    out_features, in_features = q.shape
    for name, vector in (("scale", scale), ("zero_point", zero_point)):
        if vector is not None and vector.shape != (out_features,):
            raise ShapeError(f"weight {name} has shape {tuple(vector.shape)}; give ({out_features},), one per row.")
    if q.is_meta:  # sizes without values: nothing more to look at
        return
    if zero_point is not None and not torch.equal(zero_point, zero_point.round()):
        raise ShapeError("weight zero_point has a fraction; the integer product needs whole numbers, so round it.")
    if bits <= 4 and q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ShapeError(f"the weight holds {int(q.min())}..{int(q.max())}; {bits} bits are stored as -8..7.")
    if group_scale is not None:
        _check_group_scale(group_scale, out_features, in_features, bits)


def _check_group_scale(group_scale: Tensor, out_features: int, in_features: int, bits: int) -> None:
    if bits > 4:
        raise ShapeError(f"group_scale goes with weights of up to 4 bits, not {bits}; fold it into the weight instead.")
    if group_scale.dim() != 2 or group_scale.shape[0] != out_features or in_features % max(group_scale.shape[1], 1):
        raise ShapeError(
            f"group_scale has shape {tuple(group_scale.shape)}; give ({out_features}, groups) "
            f"with a number of groups that divides in_features={in_features}."
        )
    low, high = GROUP_SCALE_RANGE
    if group_scale.numel() and (int(group_scale.min()) < low or int(group_scale.max()) > high):
        raise ShapeError(
            f"group_scale holds {int(group_scale.min())}..{int(group_scale.max())}; keep it in {low}..{high}."
        )
