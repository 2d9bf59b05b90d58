"""Times of the phases inside the library against the wall time of the calls."""

from __future__ import annotations

import time
from types import ModuleType

import pytest

from tests.kernels.cases import make_input, make_weight
from trdq_core.kernels import native
from trdq_core.kernels.observing import timed_phases
from trdq_core.kernels.types import NO_STAGES


@pytest.mark.parametrize("tokens", [6, 120])
def test_phases_add_up_to_the_wall_time(cpp: ModuleType, threads: int, tokens: int) -> None:
    """Six rows and one panel are the work of one thread, however many torch has; what is left is Python's."""
    x, weight = make_input(tokens, 16384), make_weight(64, 16384, 8)
    heads = x[:, :2048].unflatten(0, (1, -1))
    shares = []
    with native.limited_to("portable"):  # slow, so that the calls are long beside what Python adds
        for _ in range(5):
            with timed_phases() as phases:
                started = time.perf_counter()
                cpp.linear_from_float(x, NO_STAGES, weight, None, 8, True)
                cpp.attend(heads, heads, heads, 1)
                wall = 1e3 * (time.perf_counter() - started)
                shares.append(sum(phases().values()) / wall)
    assert max(shares) <= 1.0
    assert max(shares) > 0.85
