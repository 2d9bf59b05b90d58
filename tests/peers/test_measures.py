"""What torch.compile did while a tool converted a model: frames compiled, given up, broken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo import config

from trdq_core.peers.measures import compiled_since, compiled_so_far


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def double(x: torch.Tensor) -> torch.Tensor:
    """Compiles whole."""
    return 2 * x


def broken(x: torch.Tensor) -> torch.Tensor:
    """Has a graph break in the middle."""
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


def test_a_frame_that_compiles_is_counted() -> None:
    before = compiled_so_far()
    torch.compile(double, backend="eager")(torch.ones(3))
    assert compiled_since(before) == (1, 0, 0)


def test_a_recompile_limit_shows_as_given_up() -> None:
    """Each dtype asks for a graph of its own, and only one is allowed."""
    with config.patch(recompile_limit=1):
        compiled, before = torch.compile(double, backend="eager"), compiled_so_far()
        for dtype in (torch.float32, torch.float64):
            compiled(torch.ones(3, dtype=dtype))
        found = compiled_since(before)
    assert found.frames == 1
    assert found.given_up >= 1


def test_graph_breaks_are_counted() -> None:
    before = compiled_so_far()
    torch.compile(broken, backend="eager")(torch.ones(3))
    assert compiled_since(before).graph_breaks == 1
