"""Where the Triton tests run: on a GPU, or on the CPU through Triton's interpreter; and getting tensors there and back."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from trdq_core.kernels.types import QuantizedActivation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Parts = TypeVar("Parts", bound=tuple)


def moved(parts: Parts) -> Parts:
    """A named tuple with its tensors on the device of the tests."""
    return type(parts)(*(part.to(DEVICE) if isinstance(part, Tensor) else part for part in parts))


def unsigned(levels: QuantizedActivation) -> QuantizedActivation:
    """Signed levels as the reference gives them: uint8, 128 higher, on the CPU."""
    values, scale, zero_point, row_sum = (part.cpu() for part in levels)
    higher = (values.to(torch.int16) + 128).to(torch.uint8)
    return QuantizedActivation(higher, scale, zero_point + 128, (row_sum + 128 * values.shape[1]).to(torch.int32))


def signed(levels: QuantizedActivation) -> QuantizedActivation:
    """The reference's levels as the Triton kernels take them, on the device of the tests."""
    values, scale, zero_point, row_sum = levels
    lower = (values.to(torch.int16) - 128).to(torch.int8)
    return moved(QuantizedActivation(lower, scale, zero_point - 128, (row_sum - 128 * values.shape[1]).to(torch.int32)))
