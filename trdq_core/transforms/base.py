"""A fitted input transform T(x) = (x / s) B and its counterpart on the weight, exact before quantization.

T(x) = second_rotation( hadamard( permute( rotation( x / s ))))        T*(W) with T(x) T*(W)^T = x W^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.numerics.hadamard import hadamard, rotate_blocks


class InputTransform(NamedTuple):
    """What is done to a linear's input before quantization; every part may be absent.

    Rotations are stored in fp16 to stay cheap. They are then not exactly orthogonal, so the weight is folded with their
    true inverse: the layer's output is unchanged all the same.
    """

    inverse_scale: Tensor | None = None  # (channels,) fp32
    rotation: Tensor | None = None  # (n, n) fp16, one for all blocks of n channels
    permutation: Tensor | None = None  # (channels,) int32, y[j] = x[permutation[j]]
    hadamard_block: int = 0
    second_rotation: Tensor | None = None  # (n, n) fp16

    @property
    def is_identity(self) -> bool:
        """Whether nothing is done at all."""
        return not any(isinstance(part, Tensor) or part for part in self)

    @property
    def nbytes(self) -> int:
        """Bytes that this transform holds in memory."""
        return sum(part.nbytes for part in self if isinstance(part, Tensor))

    def apply(self, x: Tensor) -> Tensor:
        """T(x) for x (..., channels), in x's dtype."""
        if self.inverse_scale is not None:
            x = x * self.inverse_scale.to(x)
        if self.rotation is not None:
            x = rotate_blocks(x, self.rotation)
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation.long())
        if self.hadamard_block:
            x = rotate_blocks(x, hadamard(self.hadamard_block))
        if self.second_rotation is not None:
            x = rotate_blocks(x, self.second_rotation)
        return x

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """T*(W) (out, in) in float64, so that T(x) T*(W)^T = x W^T."""
        weight = weight.double()
        if self.inverse_scale is not None:
            weight = weight / self.inverse_scale.double()
        if self.rotation is not None:
            weight = rotate_blocks(weight, _counter_rotation(self.rotation))
        if self.permutation is not None:
            weight = weight.index_select(-1, self.permutation.long())
        if self.hadamard_block:
            weight = rotate_blocks(weight, hadamard(self.hadamard_block))
        if self.second_rotation is not None:
            weight = rotate_blocks(weight, _counter_rotation(self.second_rotation))
        return weight

    def describe(self) -> str:
        """A few words for tables: "scale, R64, permute, R64"."""
        parts = [
            "scale" if self.inverse_scale is not None else "",
            f"R{self.rotation.shape[0]}" if self.rotation is not None else "",
            "permute" if self.permutation is not None else "",
            f"H{self.hadamard_block}" if self.hadamard_block else "",
            f"R{self.second_rotation.shape[0]}" if self.second_rotation is not None else "",
        ]
        return ", ".join(filter(None, parts)) or "none"


def _counter_rotation(rotation: Tensor) -> Tensor:
    """The matrix C with R C^T = I: R itself where R is orthogonal, the inverse transposed where rounding made it inexact."""
    return torch.linalg.inv(rotation.double()).T
