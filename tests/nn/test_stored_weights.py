"""Weights as buffers: what is put in comes out, in the bytes that the codes need."""

from __future__ import annotations

import pytest
import torch

from trdq_core.nn.stored_weights import coded_buffers, dense_weight, pack, packed_buffers, shape_only, storage_bits
from trdq_core.specs import QuantSpec
from trdq_core.weights.rounding import dequantize_weight, packed_bytes, quantize_weight

SPECS = {
    "channel": QuantSpec(bits=3, symmetric=False),
    "two_level": QuantSpec(bits=4, granularity="group", group_size=32),
    "groups": QuantSpec(bits=3, symmetric=False, granularity="group", group_size=32),
    "twin_log": QuantSpec(bits=4, grid="twin_log"),
}


@pytest.mark.parametrize("name", SPECS)
def test_codes_of_all_sets_stand_for_the_same_numbers(name: str) -> None:
    torch.manual_seed(0)
    weights = [quantize_weight(torch.randn(24, 64), SPECS[name]) for _ in range(2)]
    buffers = coded_buffers(weights)
    for index, weight in enumerate(weights):
        expected = dequantize_weight(weight).float()
        assert torch.equal(dense_weight(buffers, index, shape_only(weights[0])), expected)
    held = sum(buffer.nbytes for buffer in buffers.values() if buffer is not None)
    integers = 3 * 2 * 24 * 2 if name in ("channel", "groups") else 0  # zero points are held as fp32, counted as bytes
    assert held <= sum(packed_bytes(weight) for weight in weights) + integers * 2


def test_few_bits_go_into_nibbles() -> None:
    assert [storage_bits(bits) for bits in (2, 3, 4, 5, 6, 8)] == [4, 4, 4, 8, 8, 8]
    weight = quantize_weight(torch.randn(64, 64), QuantSpec(bits=3, symmetric=False))
    assert pack(weight).data.nbytes == 64 * 64 // 2
    assert packed_buffers([pack(weight)])["qweight"].shape[0] == 1
