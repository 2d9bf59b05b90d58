"""Replaying recorded calls block by block: once in full precision, once behind the blocks that are quantized already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from trdq_core.errors import CalibrationError
from trdq_core.reconstruction.calls import RecordedCalls, Values, tensors_of
from trdq_core.reconstruction.learning import CHUNK, working_copy
from trdq_core.reconstruction.soft import prepare


class Replay:
    """Where the recorded items stand on their way through the blocks.

    `exact` holds what the full-precision blocks have put out, `quantized` what the copies with decided rounding have. Only what
    a later block reads is kept. `groups` (items,) are the time groups that static input ranges go by.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        record: RecordedCalls,
        blocks: Sequence[str],
        device: torch.device,
        groups: Tensor | None = None,
    ) -> None:
        self.record, self.device, self.groups = record, device, groups
        self.exact: dict[str, Tensor] = {}
        self.quantized: dict[str, Tensor] = {}
        self.targets: tuple[Tensor, ...] = ()  # outputs of the present block in full precision
        self.block: nn.Module | None = None  # copy of the present block, whose linears are replaced as they are decided
        self._denoiser, self._ahead, self._present = denoiser, list(blocks), ""

    def enter(self, name: str) -> nn.Module:
        """Go on to the block `name`, through all blocks before it; its copy."""
        while self._present != name:
            self.leave()
            self._present = self._ahead.pop(0)
            self.block = working_copy(self._denoiser.get_submodule(self._present))
            self.targets = self.outputs(self._denoiser.get_submodule(self._present), self._present, self.exact)
        assert self.block is not None
        return self.block

    def leave(self) -> None:
        """The present block is decided: take its outputs along."""
        if self.block is None:
            return
        keys = self.record.templates[self._present].outputs
        needed = {key for name in self._ahead for key in self.record.templates[name].inputs}
        quantized = self.outputs(self.block, self._present, self.quantized)
        for stream, new in ((self.exact, self.targets), (self.quantized, quantized)):
            stream.update(zip(keys, new, strict=True))
            for key in set(stream) - needed:
                del stream[key]
        self.block = None

    @torch.no_grad()
    def outputs(self, module: nn.Module, name: str, values: Values) -> tuple[Tensor, ...]:
        """Everything that `module`, standing at `name`, returns for all items: (items, ...), or (items, parts, ...) where it
        looks at parts of an item alone; fp32 on the CPU."""
        parts = []
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        for items in self._batches():
            prepare(module, None if self.groups is None else self.groups[items])
            args, kwargs = self.record.arguments(name, items, values, self.device, dtype)
            returned = tensors_of(module(*args, **kwargs))
            parts.append([_by_items(tensor.float().cpu(), len(items)) for tensor in returned])
        return tuple(self._in_order(column, name) for column in zip(*parts, strict=True))

    def inside(self, module: nn.Module, name: str, values: Values, inner: nn.Module) -> tuple[Tensor, Tensor]:
        """What the linear `inner` of a block reads and returns for all items, (items, ..., channels) each."""
        seen: dict[str, list[Tensor]] = {"input": [], "output": []}
        handle = inner.register_forward_hook(_watch(seen))
        try:
            self.outputs(module, name, values)
        finally:
            handle.remove()
        sizes = [len(items) for items in self._batches()]
        read, returned = (
            self._in_order([_by_items(part, size) for part, size in zip(parts, sizes, strict=True)], name)
            for parts in seen.values()
        )
        return read, returned

    def _batches(self) -> Iterator[Tensor]:
        return self.record.batches(torch.arange(self.record.count), CHUNK)

    def _in_order(self, parts: Sequence[Tensor], name: str) -> Tensor:
        """Results of the batches, (n, ...) each, as one tensor in the order of the items."""
        if len({part.shape[1:] for part in parts}) > 1:
            raise CalibrationError(
                f"{name}: its outputs differ in length from prompt to prompt, so its rounding cannot be learned alone; "
                'use unit "block", or prompts of one length.'
            )
        joined = torch.cat(list(parts))
        return joined[torch.cat(list(self._batches())).argsort()] if self.record.lengths else joined


def _by_items(tensor: Tensor, count: int) -> Tensor:
    """(count * parts, ...) as (count, parts, ...); as it is where it goes by items already."""
    return tensor if len(tensor) == count else tensor.unflatten(0, (count, -1))


def _watch(seen: dict[str, list[Tensor]]) -> object:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"].append(args[0].float().cpu())
        seen["output"].append(output.float().cpu())

    return hook
