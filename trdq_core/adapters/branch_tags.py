"""Saying around each call of a denoiser which guidance branch it holds, while a stock pipeline runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from trdq_core import branches
from trdq_core.adapters.families import GuidanceLayout
from trdq_core.adapters.probe import Branches

_USUAL = ("conditional", "unconditional")  # the order of two calls where what they are handed is alike


@contextmanager
def tagged(denoiser: nn.Module, layout: GuidanceLayout | None, told: Branches) -> Iterator[Callable[[], None]]:
    """Tag the calls of `denoiser` until the context is left; yields what ends a step.

    Two calls a step are told apart by the embeddings they are handed. Both branches in one call are what `sample` says
    already, unless the conditional half is the first: nothing here knows that order, so such calls count as single ones.
    """
    if layout == "joint":
        yield lambda: None
        return
    if layout != "two_calls":
        with branches.single():
            yield lambda: None
        return
    step, call = ExitStack(), ExitStack()
    state: dict[str, Any] = {"step": None, "calls": 0}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if state["step"] is None:
            state["step"], state["calls"] = step.enter_context(branches.two_calls()), 0
        held = told.in_call(args, kwargs) or [_USUAL[state["calls"] % 2]]
        state["calls"] += 1
        call.enter_context(state["step"].call(held[0]))

    def end_of_step() -> None:
        step.close()
        state["step"] = None

    handles = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        denoiser.register_forward_hook(lambda *seen: call.close(), always_call=True),
    ]
    try:
        yield end_of_step
    finally:
        call.close()
        step.close()
        for handle in handles:
            handle.remove()
