"""Which guidance branch a call of the denoiser computes: an explicit tag around the call, never a counter of calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

# "joint": both in one batch, the unconditional half first, as the pipelines of diffusers have it.
# "single": there is no unconditional branch (guidance 1), or nobody said.
Branch = Literal["single", "joint", "conditional", "unconditional"]


@dataclass
class GuidedStep:
    """The tag of the present call, and what the first of two calls leaves for the second, by block.

    The store belongs to one sampler step and is emptied when its context is left, however that happens.
    """

    branch: Branch = "single"
    kept: dict[Any, Any] = field(default_factory=dict)

    @contextmanager
    def call(self, branch: Literal["conditional", "unconditional"]) -> Iterator[None]:
        """Tag one of the two calls of this step."""
        before, self.branch = self.branch, branch
        try:
            yield
        except BaseException:
            self.kept.clear()
            raise
        finally:
            self.branch = before


_present: ContextVar[GuidedStep | None] = ContextVar("guided_step", default=None)


def present() -> GuidedStep:
    """The step that is being computed; a single branch where no context says otherwise."""
    return _present.get() or GuidedStep()


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
    with _entered(GuidedStep("joint")) as step:
        yield step


@contextmanager
def single() -> Iterator[GuidedStep]:
    """Calls in here have no unconditional branch."""
    with _entered(GuidedStep("single")) as step:
        yield step


@contextmanager
def two_calls() -> Iterator[GuidedStep]:
    """One sampler step that calls the denoiser once a branch, each call inside `step.call(...)`."""
    with _entered(GuidedStep()) as step:
        yield step
