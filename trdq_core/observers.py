"""Hooks that watch the inputs of linears while a model samples, in bounded memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trdq_core.errors import CalibrationError
from trdq_core.statistics import FP16_MAX, LayerStatistics
from trdq_core.timegroups import TimeArgument, TimeContext
from trdq_core.transforms.base import InputTransform

TEXT_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask")


class Observer(Protocol):
    """What sees every input of one linear."""

    def observe(self, x: Tensor, visible: Tensor | None = None) -> None:
        """Take in one input; `visible` (batch, tokens) leaves out tokens that attention never looks at."""


class InputObserver:
    """Collects, for every prompt and timestep, the channel absmax of each item and a fixed number of token rows."""

    def __init__(self, name: str, time: TimeContext, rows_per_call: int, seed: int) -> None:
        self.name = name
        self._time = time
        self._rows_per_call = rows_per_call
        self._seed = seed
        self._generator = torch.Generator()
        self._calls: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        self._finished: LayerStatistics | None = None

    def begin(self, prompt: int) -> None:
        """Start the prompt of that number. Its rows are drawn from a seed of its own, so that a resumed run draws the same."""
        self._calls = {}
        self._generator.manual_seed(1_000_003 * self._seed + prompt)

    def observe(self, x: Tensor, visible: Tensor | None = None) -> None:
        """Take in x (batch, tokens, channels) or (tokens, channels) at the present timestep."""
        if x.dim() == 2:
            x = x[None]
        x = x.detach().flatten(1, -2).float()
        seen = x if visible is None else x * visible[..., None]
        absmax = seen.abs().amax(1)
        if not torch.isfinite(absmax).all():
            raise CalibrationError(
                f"{self.name}: its input is not finite at timestep {self._time.timestep:g}; "
                "the weights hold NaN or infinity, load an undamaged model."
            )
        tokens = x.flatten(0, 1) if visible is None else x[visible]
        chosen = torch.randint(len(tokens), (self._rows_per_call,), generator=self._generator).to(x.device)
        seen_absmax, seen_rows = self._calls.setdefault(self._time.timestep, ([], []))
        seen_absmax.append(absmax.clamp_max(FP16_MAX).half().cpu())
        seen_rows.append(tokens[chosen].clamp(-FP16_MAX, FP16_MAX).half().cpu())

    @property
    def timesteps(self) -> list[float]:
        """Timesteps of the present prompt, in the order they were sampled."""
        return list(self._calls)

    @property
    def silent(self) -> bool:
        """Whether its linear was never called: some models use the weights of one without calling it."""
        return not self._calls and self._finished is None

    def finish(self) -> None:
        """The present prompt is done: add it to what is kept."""
        if self.silent:
            return
        item_absmax = _evened([torch.cat(absmax) for absmax, _ in self._calls.values()])
        rows = _evened([torch.cat(parts) for _, parts in self._calls.values()])
        self.keep(LayerStatistics(item_absmax, rows))

    def keep(self, statistics: LayerStatistics) -> None:
        """Add statistics of finished prompts, those of an interrupted calibration for instance."""
        kept = self._finished
        self._finished = statistics if kept is None else kept.joined(statistics)

    def result(self) -> LayerStatistics:
        """The statistics of all finished prompts."""
        assert self._finished is not None  # asked for only after a prompt was finished
        return self._finished


def _evened(steps: Sequence[Tensor]) -> Tensor:
    """(timesteps, most, channels) of tensors (any, channels). Steps with fewer calls, where a sampler leaves guidance out,
    repeat what they have, so that each timestep counts the same."""
    most = max(len(one) for one in steps)
    return torch.stack([one if len(one) == most else one[torch.arange(most) % len(one)] for one in steps])


class RangeObserver:
    """Second pass: the least and largest value of the transformed input, in all or in each of `count` time groups.

    With a momentum they are exponential averages over the calls, first call first, as TFMQ-DM takes them.
    """

    def __init__(
        self,
        name: str,
        time: TimeContext,
        transforms: Sequence[InputTransform],
        count: int | None = None,
        momentum: float | None = None,
    ) -> None:
        self.name = name
        self._time = time
        self._transforms = transforms
        self._momentum = momentum
        self._ranges: list[tuple[float, float] | None] = [None] * (count or len(transforms))

    @property
    def ranges(self) -> list[tuple[float, float]]:
        """Low and high of each group; zero always belongs to the range. A group never seen has that of its neighbour."""
        seen = [index for index, values in enumerate(self._ranges) if values is not None]
        if not seen:
            return [(0.0, 0.0)] * len(self._ranges)
        nearest = [min(seen, key=lambda other, index=index: abs(other - index)) for index in range(len(self._ranges))]
        found = [self._ranges[index] or (0.0, 0.0) for index in nearest]
        return [(min(low, 0.0), max(high, 0.0)) for low, high in found]

    def observe(self, x: Tensor, visible: Tensor | None = None) -> None:
        """Take in x (..., channels) at the present timestep."""
        transform = self._transforms[self._time.group if len(self._transforms) > 1 else 0]
        transformed = transform.apply((x if visible is None else x[visible]).detach().float())
        low, high = float(transformed.min()), float(transformed.max())
        index = self._time.group if len(self._ranges) > 1 else 0
        before = self._ranges[index]
        if before is not None and self._momentum is not None:
            keep = self._momentum
            low, high = keep * before[0] + (1 - keep) * low, keep * before[1] + (1 - keep) * high
        elif before is not None:
            low, high = min(low, before[0]), max(high, before[1])
        self._ranges[index] = (low, high)


@contextmanager
def observing(
    denoiser: nn.Module,
    observers: Mapping[str, Observer],
    time: TimeContext,
    *,
    argument: TimeArgument | str = "timestep",
    text_inputs: Collection[str] = (),
) -> Iterator[None]:
    """Let each observer watch the input of the linear it is listed under; all hooks are gone afterwards.

    Observers of `text_inputs` see no padding, which is most of a short prompt and which attention masks out.
    """
    text, items = TextMask(), CallItems()
    handles = [time.attach(denoiser, argument)]
    handles += [denoiser.register_forward_pre_hook(one.follow, with_kwargs=True) for one in (text, items)]
    for name, observer in observers.items():
        hook = _watch(observer, items, text if name in text_inputs else None)
        handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TextMask:
    """Which text tokens of the present call are no padding, as diffusers hands it to a denoiser."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the mask (batch, tokens) of a call, if it has one; other forms say nothing of padding."""
        mask = next((kwargs[name] for name in TEXT_MASKS if name in kwargs), None)
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def visible(self, x: Tensor) -> Tensor | None:
        """The mask, where it is that of x (batch, tokens, channels) and leaves something to see."""
        if self._mask is None or x.dim() != 3 or self._mask.shape != x.shape[:2] or not bool(self._mask.any()):
            return None
        return self._mask


class CallItems:
    """How many items, pictures or clips of one branch each, the present call of the denoiser holds."""

    def __init__(self) -> None:
        self._count = 0

    def follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the batch size of a call, that of its latents."""
        latents = args[0] if args else kwargs.get("hidden_states")
        self._count = len(latents) if isinstance(latents, Tensor) else 0

    def joined(self, x: Tensor) -> Tensor:
        """x (items, tokens, channels). Blocks of a video model read (items * frames, patches, channels) or (items * patches,
        frames, channels): there the tokens of a clip come together, so that statistics do not grow with its frames."""
        parts = x.shape[0] // self._count if self._count and x.dim() == 3 and x.shape[0] % self._count == 0 else 1
        return x.reshape(self._count, -1, x.shape[-1]) if parts > 1 else x


def _watch(observer: Observer, items: CallItems, text: TextMask | None) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:  # returning anything would replace the input
        mask = None if text is None else text.visible(args[0])
        observer.observe(items.joined(args[0]) if mask is None else args[0], mask)

    return hook
