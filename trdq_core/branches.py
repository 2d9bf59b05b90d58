"""Which guidance branch a call of the denoiser computes: an explicit tag around the call, never a counter of calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

# "joint": both in one batch, the unconditional half first, as the pipelines of diffusers have it.
# "alone": the conditional branch, whose unconditional partner is not computed in this step.
# "single": there is no unconditional branch (guidance 1), or nobody said.
Branch = Literal["single", "joint", "conditional", "unconditional", "alone"]


@dataclass
class GuidedStep:
    """The tag of the present call, and what the first of two calls leaves for the second, by block.

    The store belongs to one sampler step and is emptied when its context is left, however that happens.
    """

    branch: Branch = "single"
    kept: dict[Any, Any] = field(default_factory=dict)

    @contextmanager
    def call(self, branch: Literal["conditional", "unconditional", "alone"]) -> Iterator[None]:
        """Tag one of the two calls of this step."""
        before, self.branch = self.branch, branch
        try:
            yield
        except BaseException:
            self.kept.clear()
            raise
        finally:
            self.branch = before


class GuidedRun:
    """One sampling run, from its first step to its last. What is kept from step to step is let go when it ends."""

    def __init__(self) -> None:
        self._at_end: dict[Hashable, Callable[[], None]] = {}

    def at_end(self, owner: Hashable, forget: Callable[[], None]) -> None:
        """Call `forget` when the run is left, however that happens; once for each owner."""
        self._at_end[owner] = forget

    def leave(self) -> None:
        """Let everything go."""
        for forget in self._at_end.values():
            forget()
        self._at_end.clear()


_present: ContextVar[GuidedStep | None] = ContextVar("guided_step", default=None)
_run: ContextVar[GuidedRun | None] = ContextVar("guided_run", default=None)


def present() -> GuidedStep:
    """The step that is being computed; a single branch where no context says otherwise."""
    return _present.get() or GuidedStep()


def present_run() -> GuidedRun | None:
    """The run that is under way; None where no context says so, and then nothing is kept from step to step."""
    return _run.get()


@contextmanager
def run() -> Iterator[GuidedRun]:
    """One sampling run around its steps; `joint` and `single` are one by themselves unless they stand inside another."""
    outer = _run.get()
    if outer is not None:
        yield outer
        return
    own = GuidedRun()
    token = _run.set(own)
    try:
        yield own
    finally:
        own.leave()
        _run.reset(token)


@contextmanager
def _entered(step: GuidedStep) -> Iterator[GuidedStep]:
    token = _present.set(step)
    try:
        yield step
    finally:
        step.kept.clear()
        _present.reset(token)


@contextmanager
def joint() -> Iterator[GuidedStep]:
    """Calls in here hold both branches in one batch, the unconditional half first."""
    with run(), _entered(GuidedStep("joint")) as step:
        yield step


@contextmanager
def single() -> Iterator[GuidedStep]:
    """Calls in here have no unconditional branch."""
    with run(), _entered(GuidedStep("single")) as step:
        yield step


@contextmanager
def two_calls() -> Iterator[GuidedStep]:
    """One sampler step that calls the denoiser once a branch, each call inside `step.call(...)`; see `run`."""
    with _entered(GuidedStep()) as step:
        yield step
