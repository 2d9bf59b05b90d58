"""Weights to integers, as the kernels take them."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import ShapeError
from trdq_core.specs import QuantSpec
from trdq_core.weights.rounding import dequantize_weight, quantize_weight


def weight(rows: int = 48, columns: int = 256) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_integers_fit_their_storage_and_scales_are_fp32(bits: int, symmetric: bool) -> None:
    quantized = quantize_weight(weight(), QuantSpec(bits=bits, symmetric=symmetric))
    half = 2 ** (bits - 1)
    assert quantized.values.dtype is torch.int8
    assert quantized.values.min() >= -half
    assert quantized.values.max() <= half - 1
    assert quantized.scale.dtype is torch.float32


def test_adaround_begins_at_nearest() -> None:
    spec = QuantSpec(bits=4, symmetric=False)
    begun, nearest = (dequantize_weight(quantize_weight(weight(), spec, rounding=r)) for r in ("adaround", "nearest"))
    assert torch.equal(begun, nearest)


def test_a_zero_row_stays_zero() -> None:
    values = weight()
    values[3] = 0
    for spec in (
        QuantSpec(bits=4),
        QuantSpec(bits=4, symmetric=False),
        QuantSpec(bits=4, granularity="group", group_size=64),
    ):
        restored = dequantize_weight(quantize_weight(values, spec))
        assert torch.isfinite(restored).all()
        assert restored[3].abs().max() == 0


def test_a_group_size_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(
        ShapeError, match=r"blocks\.3\.qkv: group_size=128 does not divide in_features=1184; use one of 32"
    ):
        quantize_weight(
            torch.zeros(4, 1184), QuantSpec(bits=4, granularity="group", group_size=128), layer="blocks.3.qkv"
        )
