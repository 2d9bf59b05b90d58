"""The online half of a quantized linear: transform and quantize its input, once for all linears that read the tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trdq_core.kernels import dispatch
from trdq_core.kernels.types import InputStages, PackedWeight, QuantizedActivation, StaticGrid
from trdq_core.nn.buffers import keep_dtypes
from trdq_core.numerics.affine import choose_qparams
from trdq_core.timegroups import TimeContext
from trdq_core.transforms.base import InputTransform

_STACKED = ("inverse_scale", "rotation", "permutation", "second_rotation")


def static_grid(low: float, high: float, *, bits: int, symmetric: bool) -> StaticGrid:
    """One grid for all tokens that spans low..high; its zero point is in the unsigned 8-bit domain of the kernels."""
    scale, zero_point = choose_qparams(torch.tensor([low]), torch.tensor([high]), bits=bits, symmetric=symmetric)
    return StaticGrid(scale, torch.full_like(scale, 128.0) if zero_point is None else zero_point)


class InputQuantizer(nn.Module):
    """Quantizes a linear's input after the transform of the present time group: per token from the live values, or on a
    static grid where `ranges` (one low, high for each set) are given.

    Buffers hold one slice a resident set: (sets, ...). q, k and v of one attention share a quantizer: the last result is
    remembered as long as the very same tensor comes in again, so the work is done once.
    """

    def __init__(
        self,
        transforms: Sequence[InputTransform],
        *,
        bits: int,
        symmetric: bool,
        time: TimeContext,
        backend: dispatch.Backend,
        readers: int = 1,
        ranges: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.time, self.backend = bits, symmetric, time, backend
        self.sets = len(transforms)
        self.hadamard_block = transforms[0].hadamard_block
        self.readers = readers
        for name in _STACKED:
            parts = [getattr(transform, name) for transform in transforms]
            self.register_buffer(name, None if parts[0] is None else torch.stack(parts))
        grids = [static_grid(low, high, bits=bits, symmetric=symmetric) for low, high in ranges or ()]
        self.register_buffer("static_scale", torch.stack([g.scale for g in grids]) if grids else None)
        self.register_buffer("static_zero_point", torch.stack([g.zero_point for g in grids]) if grids else None)
        self._stages: list[InputStages] | None = None
        self._last: tuple[Any, ...] | None = None

    def forward(self, x: Tensor) -> QuantizedActivation:
        """x (..., channels) as integers (tokens, channels) with scale and zero point for each token."""
        # Inference tensors carry no version, so a change in place could not be seen: they are never remembered.
        remember = self.readers > 1 and not x.is_inference()
        key = (x._version if remember else -1, self.time.group)
        if remember and self._last is not None:
            seen, seen_key, result, uses = self._last
            if seen() is x and seen_key == key:
                # The last reader lets go, so no quantized activation outlives its use.
                self._last = (seen, seen_key, result, uses + 1) if uses + 1 < self.readers else None
                return result
        result = self.quantize(x)
        self._last = (weakref.ref(x), key, result, 1) if remember else None
        return result

    def quantize(self, x: Tensor) -> QuantizedActivation:
        """What `forward` gives, without looking at or touching what is remembered."""
        return dispatch.quantize_activation(
            x, self.stages(), self.bits, self.symmetric, self._static(), backend=self.backend
        )

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Quantize x (..., channels) and multiply at once: (..., out_features) in x's dtype."""
        return dispatch.linear_from_float(
            x, self.stages(), weight, bias, self.bits, self.symmetric, self._static(), backend=self.backend
        )

    def stages(self) -> InputStages:
        """The transform of the present time group, as the kernels take it."""
        if self._stages is None:
            self._stages = [self._stage(i) for i in range(self.sets)]
        stages = self._stages[self.time.group if self.sets > 1 else 0]
        if stages.rotation is None and stages.second_rotation is None:
            return stages
        # Widened at each call: a kept fp32 copy would double what rotations cost in memory.
        first, second = stages.rotation, stages.second_rotation
        return stages._replace(
            rotation=None if first is None else first.float(),
            second_rotation=None if second is None else second.float(),
        )

    def _static(self) -> StaticGrid | None:
        if self.static_scale is None:
            return None
        index = self.time.group if self.sets > 1 else 0
        return StaticGrid(self.static_scale[index], self.static_zero_point[index])

    def refresh(self) -> None:
        """Forget what was derived from the buffers; call it after their contents changed."""
        self._stages, self._last = None, None

    def _stage(self, index: int) -> InputStages:
        parts = {name: getattr(self, name) for name in _STACKED}
        return InputStages(
            hadamard_block=self.hadamard_block,
            **{name: None if part is None else part[index] for name, part in parts.items()},
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputQuantizer:
        self.refresh()
        return keep_dtypes(self, fn)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, sets={self.sets}, backend={self.backend}"
