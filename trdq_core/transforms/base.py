"""A fitted input transform T(x) = (x / s) B and its counterpart on the weight, exact before quantization.

T(x) = second_rotation( hadamard( permute( rotation( x / s ))))        T*(W) with T(x) T*(W)^T = x W^T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import ShapeError
from trdq_core.numerics.hadamard import hadamard, rotate_blocks


class InputTransform(NamedTuple):
    """What is done to a linear's input before quantization; every part may be absent.

    Rotations are stored in fp16 to stay cheap. They are then not exactly orthogonal, so the weight is folded with their
    true inverse: the layer's output is unchanged all the same. The random signs of a Hadamard transform stand in
    `inverse_scale`, whose entries may therefore be negative but never zero; kernels need no step of their own for them.
    """

    inverse_scale: Tensor | None = None  # (channels,) fp32, of either sign
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
        """A few words for tables: "scale, R64, permute, R64"; which rotation an adaptive step chose is told here."""
        scale = self.inverse_scale
        parts = [
            "scale" if scale is not None and not bool((scale.abs() == 1).all()) else "",
            "signs" if scale is not None and bool((scale < 0).any()) else "",
            f"R{self.rotation.shape[0]}" if self.rotation is not None else "",
            "permute" if self.permutation is not None else "",
            f"H{self.hadamard_block}" if self.hadamard_block else "",
            f"R{self.second_rotation.shape[0]}" if self.second_rotation is not None else "",
        ]
        return ", ".join(filter(None, parts)) or "none"


def aligned(transforms: Sequence[InputTransform]) -> tuple[InputTransform, ...]:
    """The transforms of one input's sets with the same parts in each, so that they stack: ones stand for a missing scale.

    A search may leave the scale out in one time group and not in another. ShapeError if the sets differ in their rotations,
    which no single recipe asks for.
    """
    shapes = {tuple(part.shape if isinstance(part, Tensor) else part for part in t[1:]) for t in transforms}
    if len(shapes) > 1:
        raise ShapeError(
            "transforms: the sets of one input differ in their rotations; choose one rotation for all sets."
        )
    scale = next((t.inverse_scale for t in transforms if t.inverse_scale is not None), None)
    if scale is None:
        return tuple(transforms)
    return tuple(
        t if t.inverse_scale is not None else t._replace(inverse_scale=torch.ones_like(scale)) for t in transforms
    )


def _counter_rotation(rotation: Tensor) -> Tensor:
    """The matrix C with R C^T = I: R itself where R is orthogonal, the inverse transposed where rounding made it inexact."""
    return torch.linalg.inv(rotation.double()).T
