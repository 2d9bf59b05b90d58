"""Recording what blocks and linears are called with while the full-precision model samples, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trdq_core.errors import CalibrationError
from trdq_core.events import Progress
from trdq_core.reconstruction.calls import BatchSize, CallTemplate, RecordedCalls, Slot, map_leaves, tensors_of
from trdq_core.sampling import SampledModel, sample
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeArgument, time_argument

ITEMS = 384  # pictures of one branch at one timestep that are recorded, at most
MEMORY = 1 << 30  # bytes of recorded tensors; a large model is recorded at fewer timesteps instead
STREAMS = 3  # of a block's output: in full precision, of the quantized blocks before, and the target
_SPREAD = 0.6180339887  # golden ratio: the timesteps of successive prompts interleave evenly


class CallRecorder:
    """Hooks on a denoiser that keep the calls of some of its modules, as long as `wanted` is set.

    Outputs are not kept. Where one of `walked`, the modules that will be replayed in order, hands its output to the next, as
    blocks hand on the hidden states, the slot of the next carries its key. So depth costs no memory. That holds for a video
    model too, which rearranges them in between, so that blocks within frames and across frames take turns.
    """

    def __init__(
        self, denoiser: nn.Module, modules: Sequence[str], argument: TimeArgument | str, *, walked: Sequence[str] = ()
    ) -> None:
        self.wanted: Callable[[], bool] = lambda: True
        self.prompt = 0
        self._denoiser, self._argument = denoiser, time_argument(argument)
        self._walked = frozenset(walked)
        self._modules = {name: denoiser.get_submodule(name) for name in modules}
        self._templates: dict[str, CallTemplate] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self._constants: dict[str, Tensor] = {}
        self._items: list[tuple[float, int, int]] = []  # timestep, prompt, branch
        self._seen: dict[int, tuple[Tensor, str]] = {}  # by id; holding the tensors keeps the ids from being used again
        self._parted: set[str] = set()
        self._left: tuple[Tensor, str] | None = None  # by the walked module before, in this call of the denoiser
        self._batch = 0
        self._recording = False

    @contextmanager
    def attached(self) -> Iterator[CallRecorder]:
        """Record while the context is open."""
        handles = [self._denoiser.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in self._modules.items():
            handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._seen, self._left = {}, None

    @property
    def bytes_per_call(self) -> int:
        """Bytes that replaying one recorded call takes: what is kept of it, and the streams between the blocks."""
        calls = len(self._items) // max(self._batch, 1)
        kept = sum(part.nbytes for parts in self._parts.values() for part in parts) // max(calls, 1)
        outputs = [tensor.nbytes for tensor, key in self._seen.values() if "/" in key]
        return kept + STREAMS * max(outputs, default=0)

    def result(self) -> RecordedCalls:
        """Everything recorded; CalibrationError if a module was never called."""
        missing = [name for name in self._modules if name not in self._templates]
        if missing:
            raise CalibrationError(
                f"{missing[0]}: the model never called it while sampling; leave it out of the rule with reconstruction."
            )
        timesteps, prompts, branches = zip(*self._items, strict=True)
        values, lengths = {}, {}
        for key in list(self._parts):  # emptied as it goes, so that nothing is held twice
            parts = self._parts.pop(key)
            texts = torch.tensor([part.shape[-2] if part.dim() > 2 else 0 for part in parts])
            if len(texts.unique()) > 1:
                lengths[key] = texts.repeat_interleave(self._batch)
                parts = [functional.pad(part, (0, 0, 0, int(texts.max()) - part.shape[-2])) for part in parts]
            values[key] = torch.cat(parts)
        columns = torch.tensor(timesteps, dtype=torch.float64), torch.tensor(prompts), torch.tensor(branches)
        return RecordedCalls(
            dict(self._templates), values, dict(self._constants), *columns, set(self._parted), lengths
        )  # fmt: skip

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._recording = self.wanted()
        self._seen, self._left = {}, None
        if self._recording:
            self._batch = len(tensors_of((args, kwargs))[0])
            timestep = self._argument.value(args, kwargs)
            self._items += [(timestep, self.prompt, branch) for branch in range(self._batch)]

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._recording:
                return
            rows = self._rows_of(tensors_of((args, kwargs)))
            slots = map_leaves((args, kwargs), Tensor, lambda tensor: self._slot(name, tensor, rows))
            if isinstance(kwargs.get("batch_size"), int):
                slots[1]["batch_size"] = BatchSize()
            returned = []
            for index, tensor in enumerate(tensors_of(output) if name in self._walked else ()):
                key = self._seen.setdefault(id(tensor), (tensor, f"{name}/{index}"))[1]
                self._parted |= {key} if len(tensor) == rows > self._batch else set()
                returned.append(key)
                self._left = (tensor, key) if index == 0 else self._left
            template = CallTemplate(*slots, tuple(returned))
            if self._templates.setdefault(name, template) != template:
                raise CalibrationError(
                    f"{name}: its arguments differ from call to call, so its rounding cannot be learned; use another rounding."
                )

        return hook

    def _rows_of(self, tensors: Sequence[Tensor]) -> int:
        """Leading size of what belongs to the items in a call of a module: that of its first tensor, if they divide it. A
        block of a video model reads (items * frames, patches, channels) or (items * patches, frames, channels)."""
        rows = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
        return rows if rows % self._batch == 0 else 0

    def _slot(self, name: str, tensor: Tensor, rows: int) -> Slot:
        """Where an argument stands; a tensor that was not seen in this call of the denoiser is kept under a new key."""
        if id(tensor) in self._seen:
            return Slot(self._seen[id(tensor)][1])
        if (moved := self._moved(name, tensor)) is not None:
            return moved
        key = f"{name}#{sum(1 for _, known in self._seen.values() if known.startswith(f'{name}#'))}"
        self._seen[id(tensor)] = (tensor, key)
        self._keep(key, tensor.detach(), rows)
        return Slot(key)

    def _moved(self, name: str, tensor: Tensor) -> Slot | None:
        """The slot of what the walked module before left, if `tensor` is that with parts and tokens changed, but for a sum
        that is the same for all items and tokens."""
        left, key = self._left or (None, "")
        if left is None or key not in self._parted or left.numel() != tensor.numel() or tensor.dim() != 3:
            return None
        turned = left.detach().unflatten(0, (self._batch, -1)).transpose(1, 2)
        seen = tensor.detach().unflatten(0, (self._batch, -1))
        if seen.shape != turned.shape:
            return None
        gap = (seen - turned).float()
        if not gap.any():
            return Slot(key, moved=True)
        offset, name = gap.mean((0, 1)).cpu(), f"{name}#offset"
        tolerance = 16 * torch.finfo(tensor.dtype).eps * float(seen.abs().max())
        kept = self._constants.get(name, offset)
        if float((gap - kept.to(gap.device)).abs().max()) > tolerance:
            return None
        self._constants[name] = kept
        return Slot(key, moved=True, offset=name)

    def _keep(self, key: str, tensor: Tensor, rows: int) -> None:
        leading = tensor.shape[0] if tensor.dim() else 0
        if leading > self._batch and leading == rows:
            self._parted.add(key)
            tensor, leading = tensor.unflatten(0, (self._batch, -1)), self._batch
        if leading in (1, self._batch):
            parts = self._parts.setdefault(key, [])
            if parts and _besides_length(parts[0]) != _besides_length(tensor):
                raise CalibrationError(
                    f"{key.partition('#')[0]}: its input has {tuple(tensor.shape[1:])} values now and "
                    f"{tuple(parts[0].shape[1:])} before; reconstruction needs prompts padded to one length."
                )
            parts.append(tensor.expand(self._batch, *tensor.shape[1:]).to("cpu", copy=True))
        elif not torch.equal(self._constants.setdefault(key, tensor.to("cpu", copy=True)), tensor.cpu()):
            raise CalibrationError(
                f"{key.partition('#')[0]}: its input has {leading} rows for {self._batch} pictures and changes from call to "
                "call, so it cannot be cut into items; use another rounding."
            )


def _besides_length(tensor: Tensor) -> tuple[int, ...]:
    """What has to be the same in every call: all sizes but the first and, of (items, ..., tokens, channels), the tokens."""
    return tensor.shape[1:] if tensor.dim() < 3 else (*tensor.shape[1:-2], tensor.shape[-1])


class EvenChoice:
    """Which calls to record: the same number for every prompt, spread evenly over its timesteps."""

    def __init__(self, prompts: int, calls: int, wanted: int) -> None:
        self.prompts, self.calls = prompts, calls
        self.per_prompt = max(1, min(calls, wanted // prompts))

    def steps(self, prompt: int) -> set[int]:
        """Indices of the calls to record while sampling a prompt."""
        offset = (prompt * _SPREAD) % 1
        return {int((i + offset) * self.calls / self.per_prompt) for i in range(self.per_prompt)}

    def limit(self, bytes_per_call: int) -> None:
        """Record fewer calls where all of them would pass the memory bound."""
        affordable = MEMORY // max(1, bytes_per_call * self.prompts)
        self.per_prompt = max(1, min(self.per_prompt, affordable))


def record_calls(
    model: SampledModel,
    blocks: Sequence[str],
    alone: Sequence[str],
    statistics: Statistics,
    start: Callable[[int], Progress],
    *,
    items: int = ITEMS,
) -> RecordedCalls:
    """Sample the calibration's prompts in full precision and record calls of blocks, which follow each other, and of further
    modules, spread over prompts and timesteps. `start` is told how many steps will be sampled."""
    about = statistics.about
    calls = max(1, items // (2 if about["guidance"] > 1 else 1))
    numbers = range(0, len(about["prompts"]), -(-len(about["prompts"]) // calls))
    conditionings = model.encode([about["prompts"][number] for number in numbers])
    choice = EvenChoice(len(conditionings), about["steps"], calls)
    progress = start(len(conditionings) * about["steps"])
    recorder = CallRecorder(model.denoiser, [*blocks, *alone], model.timestep_argument, walked=blocks)
    step = 0

    def wanted() -> bool:
        return step in choice.steps(recorder.prompt)

    def next_step(*_: object) -> None:
        nonlocal step
        if recorder.prompt == 0 and wanted():
            choice.limit(recorder.bytes_per_call)
        step += 1
        progress.advance(f"recording prompt {recorder.prompt + 1} of {len(conditionings)}")

    recorder.wanted = wanted
    with recorder.attached():
        for recorder.prompt, conditioning in enumerate(conditionings):
            step = 0
            seed = about["seed"] + numbers[recorder.prompt]
            sample(model, conditioning, seed, steps=about["steps"], guidance=about["guidance"], on_step=next_step)
    return recorder.result()
