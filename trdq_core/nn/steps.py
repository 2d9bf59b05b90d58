"""What a denoiser keeps from one sampler step to the next, and self-attention that takes its output from the step before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trdq_core import branches
from trdq_core.timegroups import TimeContext, TimeGroups

# Which branches a call holds, in the order of its batch. With guidance 1 there is the conditional one alone.
PARTS: dict[str, tuple[str, ...]] = {
    "joint": ("unconditional", "conditional"),
    "conditional": ("conditional",),
    "unconditional": ("unconditional",),
    "alone": ("conditional",),
    "single": ("conditional",),
}


class StepMemory:
    """Which step of a run a denoiser computes, and what was left in the step before. One for each denoiser.

    A call at a smaller timestep begins the next step, one at the same timestep belongs to the present one (the other
    branch), one at a larger timestep begins another run. Everything is let go when a run begins and when it is left,
    by its end, a cancel or an exception. Outside of `branches.run` nothing is kept.
    """

    def __init__(self, time: TimeContext) -> None:
        self.time = time
        self.step = 0
        self.readers: list[ReusingAttention] = []
        self.direction: Tensor | None = None  # the last guidance difference, conditional minus unconditional output
        self._timestep = 0.0
        self._run: branches.GuidedRun | None = None
        self._kept: dict[Any, tuple[int, Tensor]] = {}

    @property
    def running(self) -> bool:
        """Whether a run is under way, so that something may be kept."""
        return self._run is not None

    def enter(self) -> None:
        """A call of the denoiser begins; the time context is already at its timestep."""
        run, timestep = branches.present_run(), self.time.timestep
        if run is None or run is not self._run or timestep > self._timestep:
            self.forget()
            self._run = run
            if run is not None:
                run.at_end(self, self.forget)
        elif timestep < self._timestep:
            self.step += 1
            self._kept = {key: entry for key, entry in self._kept.items() if entry[0] >= self.step - 1}
        self._timestep = timestep

    def keep(self, key: Any, value: Tensor) -> None:
        """Leave `value` for the next step."""
        if self.running:
            self._kept[key] = (self.step, value.detach())

    def last(self, key: Any) -> Tensor | None:
        """What was left under `key` in the step before this one; None if nothing was."""
        step, value = self._kept.get(key, (None, None))
        return value if step == self.step - 1 else None

    def nbytes(self) -> int:
        """Bytes kept at present."""
        return sum(value.nbytes for _, value in self._kept.values())

    def forget(self) -> None:
        """Let everything go; the next call begins a run."""
        self._kept.clear()
        self._run, self.direction, self.step = None, None, 0
        for reader in self.readers:
            reader.given = reader.left = None


class ReusingAttention:
    """The processor of a block whose output is, at every second step, that of the step before: nothing of it is computed.

    What is kept is the output (items, tokens, channels) of each branch, not the map. An output that was itself taken from
    the step before is never passed on. `inner` is the processor that computes: the plain one, or a shared one.
    """

    def __init__(
        self, inner: Callable[..., Tensor], groups: TimeGroups, active: frozenset[int], memory: StepMemory
    ) -> None:
        self.inner, self.groups, self.active, self.memory = inner, groups, active, memory
        self.given: Tensor | None = None  # from the step before, all branches of the coming call in one batch
        self.left: Tensor | None = None  # by a compiled call, which cannot put it into the memory itself
        self._calls = torch.zeros(2, dtype=torch.int64)  # reused, computed
        self._parts: tuple[str, ...] = ("conditional",)
        self._on = False
        memory.readers.append(self)

    @property
    def reused_calls(self) -> int:
        """How often the output of the step before was taken."""
        return int(self._calls[0])

    @property
    def computed_calls(self) -> int:
        """How often it was computed."""
        return int(self._calls[1])

    def collect(self) -> None:
        """Put what a compiled call left into the memory, while that still stands at the call's step."""
        if self.left is not None:
            self._keep(self.left)
            self.left = None

    def prepare(self) -> None:
        """Look up time, branch and what there is from the step before; done before the graphs of torch.compile."""
        self._parts = PARTS[branches.present().branch]
        self._on = self.memory.running and self.groups.group_of(self.memory.time.timestep) in self.active
        found = [self.memory.last((self, part)) for part in self._parts] if self._on else [None]
        self.given = None
        if not any(value is None for value in found):
            self.given = found[0] if len(found) == 1 else torch.cat(found)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The attention's output (batch, tokens, channels)."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.prepare()
        own = self._on and encoder_hidden_states is None
        if own and self.given is not None and self.given.shape == hidden_states.shape:
            self._calls[0] += 1
            return self.given
        output = self.inner(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, temb=temb
        )
        self._calls[1] += 1
        if own:
            if compiling:
                self.left = output
            else:
                self._keep(output)
        return output

    def _keep(self, output: Tensor) -> None:
        if len(output) % len(self._parts) == 0:
            for part, rows in zip(self._parts, output.chunk(len(self._parts)), strict=True):
                self.memory.keep((self, part), rows)
