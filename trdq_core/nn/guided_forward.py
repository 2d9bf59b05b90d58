"""The forward of a denoiser that may leave out the unconditional branch late in sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trdq_core import branches
from trdq_core.errors import ShapeError
from trdq_core.nn.attention import SharedAttention
from trdq_core.nn.steps import ReusingAttention, StepMemory
from trdq_core.specs import SkippedGuidance


class GuidedForward:
    """Stands in for `denoiser.forward`: tells its processors what call comes, and skips the unconditional branch.

    Below the timestep `below` only the conditional branch is computed. What the sampler gets as the unconditional output
    is `conditional - d`, so that its `u + w (c - u)` becomes `c + (w - 1) d`: with "held", d is the guidance difference
    of the last step that computed both; with "off", d is 0 and the guidance is off. A step is computed in full while
    no difference is known yet. In one batch the halves are cut out of every input and put together again after; of two
    calls, the second is answered from the first. An unconditional call that comes first is computed.
    """

    def __init__(
        self,
        plain: Callable[..., Any],
        memory: StepMemory,
        processors: Sequence[SharedAttention | ReusingAttention],
        below: float | None,
        guidance: SkippedGuidance,
    ) -> None:
        self.plain, self.memory, self.processors = plain, memory, tuple(processors)
        self.below, self.guidance = below, guidance
        self.skipped_calls = 0  # of the unconditional branch
        self.full_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the plain forward returns, with the first tensor changed where the unconditional branch is skipped."""
        step, skipping = self._begin()
        if step.branch == "joint":
            return self._joint(step, skipping, args, kwargs)
        if step.branch in ("conditional", "unconditional") and self.below is not None:
            return self._one_of_two(step, skipping, args, kwargs)
        return self.plain(*args, **kwargs)

    @torch.compiler.disable
    def _begin(self) -> tuple[branches.GuidedStep, bool]:
        """The tag of this call, and whether its unconditional branch may be left out."""
        step = branches.present()
        for processor in self.processors:
            if isinstance(processor, ReusingAttention):
                processor.collect()
        self.memory.enter()
        self._prepare()
        late = self.below is not None and self.memory.time.timestep < self.below
        return step, late and (self.guidance == "off" or self.memory.direction is not None)

    @torch.compiler.disable
    def _prepare(self) -> None:
        for processor in self.processors:
            processor.prepare()

    def _joint(
        self, step: branches.GuidedStep, skipping: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if self.below is None:
            return self.plain(*args, **kwargs)
        batch = _batch(args, kwargs)
        if batch % 2:
            raise ShapeError(f"guidance: got a batch of {batch}; with both branches in one batch it must be even.")
        if not skipping:
            output = self.plain(*args, **kwargs)
            unconditional, conditional = first_tensor(output).chunk(2)
            self._remember(conditional, unconditional)
            return output
        with step.call("alone"):
            self._prepare()
            output = self.plain(*_second_half(args, batch), **_second_half(kwargs, batch))
        self.skipped_calls += 1
        conditional = first_tensor(output)
        return with_first(output, torch.cat([self._stand_in(conditional), conditional]))

    def _one_of_two(
        self, step: branches.GuidedStep, skipping: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        branch, timestep = step.branch, self.memory.time.timestep
        other = "unconditional" if branch == "conditional" else "conditional"
        seen, theirs = step.kept.pop((self, other), (None, None))
        partner = theirs if seen == timestep else None
        if branch == "unconditional" and skipping and partner is not None:
            self.skipped_calls += 1
            return with_first(partner, self._stand_in(first_tensor(partner)))
        if branch == "conditional" and skipping:
            with step.call("alone"):
                self._prepare()
                output = self.plain(*args, **kwargs)
        else:
            output = self.plain(*args, **kwargs)
        if partner is None:
            step.kept[self, branch] = (timestep, output)
        else:
            pair = (output, partner) if branch == "conditional" else (partner, output)
            self._remember(*(first_tensor(part) for part in pair))
        return output

    def _remember(self, conditional: Tensor, unconditional: Tensor) -> None:
        self.full_calls += 1
        if self.guidance == "held" and self.memory.running and conditional.shape == unconditional.shape:
            self.memory.direction = (conditional - unconditional).detach()

    def _stand_in(self, conditional: Tensor) -> Tensor:
        """What the sampler gets as the unconditional output."""
        direction = self.memory.direction
        if self.guidance == "off" or direction is None:
            return conditional
        if direction.shape != conditional.shape:
            raise ShapeError(
                f"guidance: got outputs of {tuple(conditional.shape)} after {tuple(direction.shape)} in one run; "
                "keep the batch and size the same from step to step."
            )
        return conditional - direction


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: a tensor, a tuple that begins with one, or an output with `sample`."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def with_first(output: Any, value: Tensor) -> Any:
    """`output` with another prediction in it."""
    if isinstance(output, Tensor):
        return value
    return (value, *output[1:]) if isinstance(output, tuple) else type(output)(sample=value)


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The batch size of a call: that of the latents, its first input."""
    return len(args[0] if args else kwargs["hidden_states"])


def _second_half(value: Any, batch: int) -> Any:
    """Every tensor over the batch cut to its second half, wherever it stands in the arguments."""
    if isinstance(value, Tensor):
        return value[batch // 2 :] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: _second_half(part, batch) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_second_half(part, batch) for part in value)
    return value
