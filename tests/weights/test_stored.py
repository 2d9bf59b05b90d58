"""Weights as they are kept: levels, and bytes counted against bits that were really packed (invariants 24 and 37)."""

from __future__ import annotations

import pytest
import torch

from trdq_core.numerics.packing import pack_bits, unpack_bits
from trdq_core.specs import QuantSpec
from trdq_core.weights.grids import fit_grid
from trdq_core.weights.rounding import quantize_weight
from trdq_core.weights.stored import CodedWeight, QuantizedWeight, dequantize_weight, level_table, packed_bytes

SPECS = [
    QuantSpec(bits=4),
    QuantSpec(bits=6, symmetric=False),
    QuantSpec(bits=4, granularity="group", group_size=16),
    QuantSpec(bits=3, granularity="group", group_size=16),
    QuantSpec(bits=4, granularity="group", group_size=16, symmetric=False),
    QuantSpec(bits=3, grid="twin_log", range="mse"),
]


def weight() -> torch.Tensor:
    return torch.randn(7, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", SPECS)
def test_invariant_24_packed_codes_come_back(spec: QuantSpec) -> None:
    stored = quantize_weight(weight(), spec)
    half = 2 ** (spec.bits - 1)
    codes = stored.codes if isinstance(stored, CodedWeight) else (stored.values.int() + half).to(torch.uint8)
    back = unpack_bits(pack_bits(codes, spec.bits), spec.bits, codes.numel()).view(codes.shape)
    assert torch.equal(back, codes)
    packed = stored._replace(codes=back) if isinstance(stored, CodedWeight) else stored
    assert torch.equal(dequantize_weight(packed), dequantize_weight(stored))


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(bits=8, symmetric=False)])
def test_in_float32_a_weight_is_the_exact_one_rounded_once(spec: QuantSpec) -> None:
    stored = quantize_weight(weight(), spec)
    assert torch.equal(dequantize_weight(stored, torch.float32), dequantize_weight(stored).float())


@pytest.mark.parametrize("spec", SPECS[:3])
def test_rounding_to_nearest_is_encoding_the_nearest_values(spec: QuantSpec) -> None:
    grid = fit_grid(weight(), spec)
    begun, stored = weight(), quantize_weight(weight(), spec)
    again = grid.encode(grid.nearest(begun.double()))
    assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True) if isinstance(a, torch.Tensor))
    assert torch.equal(begun, weight())  # rounded out of place


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (SPECS[0], 7 * 4),  # a scale a row
        (SPECS[1], 7 * 4 + 7),  # and a zero point of one byte
        (SPECS[2], 7 * 4 + 7 * 3),  # and three integer group scales
        (SPECS[3], 7 * 3 * 4),  # a float scale a group
        (SPECS[4], 7 * 3 * 4 + 7 * 3),
        (SPECS[5], 7 * 2 * 4),  # the largest level and the growth
    ],
)
def test_bytes_are_codes_without_gaps_and_every_parameter(spec: QuantSpec, parameters: int) -> None:
    stored = quantize_weight(weight(), spec)
    codes = pack_bits(torch.zeros(7 * 48, dtype=torch.uint8), spec.bits)
    assert packed_bytes(stored) == codes.numel() + parameters


@pytest.mark.parametrize("spec", SPECS[3:])
def test_coded_weights_index_a_table_of_levels(spec: QuantSpec) -> None:
    stored = quantize_weight(weight(), spec)
    assert isinstance(stored, CodedWeight)
    assert stored.codes.dtype is torch.uint8
    assert stored.parameters.dtype is torch.float32
    table = level_table(stored)
    assert table.shape == (7, 48 // stored.group_size, 2**spec.bits)
    row, column = 4, 33
    assert (
        dequantize_weight(stored)[row, column]
        == table[row, column // stored.group_size, int(stored.codes[row, column])]
    )


def test_integer_weights_keep_their_ranges() -> None:
    for bits in (2, 3, 5, 8):
        for symmetric in (True, False):
            stored = quantize_weight(weight(), QuantSpec(bits=bits, symmetric=symmetric))
            assert isinstance(stored, QuantizedWeight)
            assert stored.values.min() >= -(2 ** (bits - 1))
            assert stored.values.max() <= 2 ** (bits - 1) - 1
