"""Invariant 24: packed codes come back, at any length."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import ShapeError
from trdq_core.numerics.packing import pack_bits, packed_size, unpack_bits


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 7, 8))
@pytest.mark.parametrize("count", (0, 1, 2, 7, 8, 9, 63, 1001))
def test_invariant_24_unpacking_gives_what_was_packed(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    data = pack_bits(codes, bits)
    assert data.dtype is torch.uint8
    assert data.numel() == packed_size(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_bits(data, bits, count), codes)


def test_codes_lie_lowest_bit_first_without_gaps() -> None:
    assert pack_bits(torch.tensor([1, 2, 7, 0, 5]), 3).tolist() == [0b11_010_001, 0b0_101_000_1]
    assert pack_bits(torch.tensor([[1, 2], [3, 4]]), 4).tolist() == [0x21, 0x43]


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(ShapeError, match=r"got 0..8; 3 bits hold 0..7"):
        pack_bits(torch.tensor([0, 8]), 3)
    with pytest.raises(ShapeError, match="got 3 bytes; 9 codes of 3 bits need 4"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 9)
    with pytest.raises(ShapeError, match="bits: got 9"):
        pack_bits(torch.tensor([0]), 9)
