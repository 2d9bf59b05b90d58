"""The online half of a quantized linear: transform and quantize its input, once for all linears that read the tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trdq_core.kernels import dispatch
from trdq_core.kernels.types import Epilogue, InputStages, PackedWeight, Prologue, QuantizedActivation, StaticGrid
from trdq_core.nn.buffers import check_in_memory, keep_dtypes
from trdq_core.nn.input_grid import InputGrid, stacked
from trdq_core.timegroups import TimeContext
from trdq_core.transforms.base import InputTransform

_STACKED = ("inverse_scale", "rotation", "permutation", "second_rotation")


class QuantizedInput(NamedTuple):
    """What the linears behind one input share: its integers (floats on the grid where simulated), the low-rank product."""

    values: QuantizedActivation | Tensor
    low_rank: Tensor | None  # (tokens, rank)

    def rows(self, first: int) -> QuantizedInput:
        """The tokens from `first` on; nothing is copied or quantized again."""
        values = self.values[first:] if isinstance(self.values, Tensor) else self.values.rows(first)
        return QuantizedInput(values, None if self.low_rank is None else self.low_rank[first:])


class InputQuantizer(nn.Module):
    """Quantizes a linear's input after the transform of the present time group: per token from the live values, or on a
    static grid. Grids that no integer kernel takes are rounded in floating point (`simulated`).

    Buffers hold one slice a resident set: (sets, ...); static grids one a set or one a time group. q, k and v of one
    attention share a quantizer: the last result is remembered as long as the very same tensor comes in again, so the work
    is done once. `low_rank_down` (rank, channels) of each set acts on the untransformed input.
    """

    def __init__(
        self,
        transforms: Sequence[InputTransform],
        grid: InputGrid,
        *,
        time: TimeContext,
        backend: dispatch.Backend,
        readers: int = 1,
        simulated: bool = False,
        low_rank_down: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.grid, self.time, self.backend, self.readers = grid, time, backend, readers
        self.simulated = simulated or not grid.integer
        self.sets = len(transforms)
        self.hadamard_block = transforms[0].hadamard_block
        for name in _STACKED:
            parts = [getattr(transform, name) for transform in transforms]
            self.register_buffer(name, None if parts[0] is None else torch.stack(parts))
        scale, zero_point = stacked(grid.static_grids())
        self.register_buffer("static_scale", scale)
        self.register_buffer("static_zero_point", zero_point)
        down = torch.stack([part.half() for part in low_rank_down]) if low_rank_down else None
        self.register_buffer("low_rank_down", down)
        self.file_bytes = sum(buffer.nbytes for buffer in self.buffers())
        self._stages: list[InputStages] | None = None
        self._last: tuple[Any, ...] | None = None
        self._traced: tuple[Any, ...] | None = None
        self._refreshed = 0

    @property
    def bits(self) -> int:
        """Bits of the input; 16 stands for floating point."""
        return 16 if self.grid.spec is None else self.grid.spec.bits

    @property
    def symmetric(self) -> bool:
        """Whether the grid has no zero point."""
        return self.grid.spec is None or self.grid.spec.symmetric

    @property
    def set_index(self) -> int:
        """Which of the resident sets the present time group uses."""
        return self.time.group if self.sets > 1 else 0

    @property
    def state(self) -> tuple[int, int]:
        """What the result for one and the same input hangs on: the time group, and how often buffers were exchanged."""
        return self.time.group, self._refreshed

    def forward(
        self, x: Tensor, weight: PackedWeight | None = None, bias: Tensor | None = None
    ) -> QuantizedInput | tuple[Tensor, Tensor | None]:
        """x (..., channels) as integers (tokens, channels) with scale and zero point for each token.

        With a weight: what `linear` and `low_rank_product` give. Layers come through here, not to those by name, because
        offloading brings buffers in when a module is called.
        """
        if weight is not None:
            return self.linear(x, weight, bias), self.low_rank_product(x)
        if torch.compiler.is_compiling():
            return self._traced_result(x)
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

    def _traced_result(self, x: Tensor) -> QuantizedInput:
        """What `forward` gives, in a graph: weak references and versions cannot be traced, but one tensor is one node.

        The last reader lets go here too, so a graph of a whole attention neither repeats the work nor returns it.
        """
        if self.readers == 1:
            return self.quantize(x)
        if self._traced is not None and self._traced[0] is x:
            result, uses = self._traced[1], self._traced[2] + 1
        else:
            result, uses = self.quantize(x), 1
        self._traced = (x, result, uses) if uses < self.readers else None
        return result

    def quantize(self, x: Tensor) -> QuantizedInput:
        """What `forward` gives, without looking at or touching what is remembered."""
        if self.simulated:
            transformed = dispatch.transform(x, self.stages(), backend=self.backend)
            values = self.grid.round(transformed.reshape(-1, x.shape[-1]).float(), self.time.group)
        else:
            values = dispatch.quantize_activation(
                x, self.stages(), self.bits, self.symmetric, self._static(), self._clip(), backend=self.backend
            )
        return QuantizedInput(values, self.low_rank_product(x))

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """Quantize x (..., channels) and multiply at once, without the low-rank part: (..., out_features) in x's dtype."""
        return self.linears(x, [(weight, bias)])

    def linears(
        self,
        x: Tensor,
        weights: Sequence[tuple[PackedWeight, Tensor | None]],
        prologue: Prologue | None = None,
        epilogue: Epilogue | None = None,
    ) -> Tensor:
        """The same for weights with biases that read one input: their outputs side by side."""
        return dispatch.linears_from_float(
            x,
            self.stages(),
            weights,
            self.bits,
            self.symmetric,
            self._static(),
            self._clip(),
            prologue=prologue,
            epilogue=epilogue,
            backend=self.backend,
        )

    def low_rank_product(self, x: Tensor) -> Tensor | None:
        """x (..., channels) through the first factor of the low-rank branch: (tokens, rank) fp32; None without a branch."""
        if self.low_rank_down is None:
            return None
        rows = x.reshape(-1, x.shape[-1]).float()
        return functional.linear(rows, self.low_rank_down[self.set_index].float())

    def stages(self) -> InputStages:
        """The transform of the present time group, as the kernels take it."""
        if torch.compiler.is_compiling():  # nothing that a graph made is kept outside of it
            stages = self._stage(self.set_index)
        else:
            if self._stages is None:
                self._stages = [self._stage(i) for i in range(self.sets)]
            stages = self._stages[self.set_index]
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
        index = self.time.group if len(self.static_scale) > 1 else 0
        return StaticGrid(self.static_scale[index], self.static_zero_point[index])

    def _clip(self) -> float:
        clips = self.grid.clips
        return clips[self.time.group if len(clips) > 1 else 0]

    def refresh(self) -> None:
        """Forget what was derived from the buffers; call it after their contents changed."""
        self._stages, self._last, self._traced = None, None, None
        self._refreshed += 1

    def prepare(self, buffers: Mapping[str, Tensor]) -> InputStages:
        """What `take` wants beside the buffers of one set; touches nothing of the quantizer, so a thread may make it."""
        return self._stage(0, {**self._buffers, **buffers})

    def take(self, buffers: Mapping[str, Tensor], prepared: InputStages) -> None:
        """Put the buffers of another set in the place of the present one's."""
        self._buffers.update(buffers)
        self.refresh()
        self._stages = [prepared]

    def _stage(self, index: int, buffers: Mapping[str, Tensor | None] | None = None) -> InputStages:
        buffers = self._buffers if buffers is None else buffers
        parts = {name: buffers[name] for name in _STACKED}
        for part in parts.values():
            check_in_memory(part)
        return InputStages(
            hadamard_block=self.hadamard_block,
            **{name: None if part is None else part[index] for name, part in parts.items()},
        )

    def fit_backend(self, device: torch.device) -> None:
        """Take the fastest backend of the device that the weights are on, if the present one cannot run there."""
        stranger = "triton" if device.type == "cpu" else "cpp"  # the backend of the other kind of device
        if device.type != "meta" and self.backend == stranger:
            self.backend = dispatch.select_backend(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputQuantizer:
        self.refresh()
        return keep_dtypes(self, fn)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, sets={self.sets}, backend={self.backend}"
