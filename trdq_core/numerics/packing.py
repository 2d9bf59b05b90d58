"""Unsigned codes of 2 to 8 bits without a gap between them: the form in which they are counted and stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.errors import ShapeError


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape) below 2^bits as uint8 (ceil(numel * bits / 8),), lowest bit first, the last byte filled with zeros."""
    _check_bits(bits)
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and not flat.is_meta and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ShapeError(f"codes: got {int(flat.min())}..{int(flat.max())}; {bits} bits hold 0..{2**bits - 1}.")
    per_word, word_bytes = _word(bits)
    words = functional.pad(flat, (0, -flat.numel() % per_word)).view(-1, per_word)
    merged = (words << (bits * torch.arange(per_word, device=codes.device))).sum(1)
    data = (merged[:, None] >> (8 * torch.arange(word_bytes, device=codes.device))) & 255
    return data.flatten()[: packed_size(flat.numel(), bits)].to(torch.uint8)


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes given to `pack_bits`: uint8 (count,). ShapeError if `data` is not as long as they need."""
    _check_bits(bits)
    if data.numel() != packed_size(count, bits):
        raise ShapeError(
            f"packed codes: got {data.numel()} bytes; {count} codes of {bits} bits need {packed_size(count, bits)}."
        )
    per_word, word_bytes = _word(bits)
    filled = functional.pad(data.flatten().to(torch.int64), (0, -data.numel() % word_bytes)).view(-1, word_bytes)
    merged = (filled << (8 * torch.arange(word_bytes, device=data.device))).sum(1)
    codes = (merged[:, None] >> (bits * torch.arange(per_word, device=data.device))) & (2**bits - 1)
    return codes.flatten()[:count].to(torch.uint8)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def _word(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest run of codes that ends at a byte's border; at most 56 bits, so it fits an int64."""
    word_bits = math.lcm(bits, 8)
    return word_bits // bits, word_bits // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ShapeError(f"bits: got {bits}; codes of 1 to 8 bits can be packed.")
