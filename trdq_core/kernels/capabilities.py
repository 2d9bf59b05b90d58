"""What each NVIDIA chip multiplies in integer units, and what would only be simulated there.

A kernel counts as real where its product runs in the chip's own units for those types. The table is printed in
docs/gpu.md; a test compares the two.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Path = Literal["triton", "torch", "simulated"]
Operation = Literal["int8 product", "int4 product", "fp8 product", "fused quantization"]
OPERATIONS: tuple[Operation, ...] = ("int8 product", "int4 product", "fp8 product", "fused quantization")

FIRST_TRITON = (8, 0)  # what Triton 3 supports
FIRST_INT8 = (7, 5)  # the first tensor cores that multiply int8; `torch._int_mm` stands on them
FIRST_FP8 = (8, 9)


_NOTES = {
    (10, 0): "Triton 3.7 compiles int8 products to the older mma.sync here, not to tcgen05.",
    (10, 3): "Its int8 units run at a fraction of its bf16 units.",
}


class Chip(NamedTuple):
    """What runs each operation on a chip: a Triton kernel, torch's own call, or floating point in its place."""

    int8: Path
    int4: Path
    fp8: Path
    quantize: Path
    note: str = ""


def support(capability: tuple[int, int] | None) -> Chip:
    """What runs on a chip of this compute capability, (8, 0) for an A100; None stands for no NVIDIA chip at all.

    int4 weights are unpacked in registers and multiplied as int8: that saves memory, and 4-bit units are not used
    anywhere. "torch" for int4 means unpacked by torch before `_int_mm`: integer products, without the memory traffic
    saved. fp8 products are an operator without a recipe.
    """
    if capability is None or capability < FIRST_INT8:
        return Chip("simulated", "simulated", "simulated", "torch")
    if capability < FIRST_TRITON:
        return Chip("torch", "torch", "simulated", "torch", "Triton needs compute capability 8.0.")
    fp8: Path = "triton" if capability >= FIRST_FP8 else "simulated"
    return Chip("triton", "triton", fp8, "triton", _NOTES.get(capability, ""))


@lru_cache(maxsize=64)  # asked at every launch
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of `device`; None for CPUs, other vendors' GPUs, and where CUDA does not run."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
