"""Measuring: percentiles, interleaving, recorded inputs, peaks that start anew."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

from trdq_core import profiling


def test_summary_of_timings() -> None:
    assert profiling.summary([float(i) for i in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0, "n": 11}
    assert profiling.summary([2.5]) == {"median": 2.5, "p10": 2.5, "p90": 2.5, "n": 1}


def test_variants_take_turns_after_a_warm_up() -> None:
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = profiling.time_interleaved(variants, 3, after_round=lambda: order.append("|"))
    assert "".join(order) == "ab" * profiling.WARM_UP + "ab|ba|ab|"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert min(min(values) for values in times.values()) >= 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 19])
def test_each_variant_meets_all_places_and_all_predecessors(count: int) -> None:
    """Over one square (two for an odd count) every ordered pair of neighbours comes equally often."""
    names = [str(index) for index in range(count)]
    rounds = [profiling.round_order(names, turn) for turn in range(2 * count)]
    for place in range(count):
        assert sorted(order[place] for order in rounds) == sorted(2 * names)
    pairs = Counter(pair for order in rounds for pair in pairwise(order))
    assert set(pairs.values()) <= {2}
    assert len(pairs) == count * (count - 1)


def test_ratios_are_those_of_rounds() -> None:
    assert profiling.ratios([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == {"median": 1.0, "p10": 0.5, "p90": 2.0, "n": 3}


class Denoiser(nn.Module):
    """Takes its timestep by place or by name."""

    def forward(self, hidden_states: torch.Tensor, timestep: int = 0) -> torch.Tensor:
        """The states, moved."""
        return hidden_states + timestep


def test_inputs_are_recorded_by_name_and_the_hook_goes() -> None:
    denoiser, x = Denoiser(), torch.zeros(1)
    calls = profiling.record_inputs(denoiser, lambda: [denoiser(x, 3), denoiser(hidden_states=x, timestep=4)])
    assert [call["timestep"] for call in calls] == [3, 4]
    assert all(call["hidden_states"] is x for call in calls)
    with pytest.raises(RuntimeError, match="no"):
        profiling.record_inputs(denoiser, _fail)
    assert not denoiser._forward_pre_hooks


def _fail() -> None:
    raise RuntimeError("no")


def test_peak_memory_sees_what_is_held_and_forgets_it() -> None:
    profiling.reset_peak_memory()
    before = profiling.peak_rss_bytes()
    held = bytearray(b"x" * 200_000_000)
    during = profiling.peak_rss_bytes()
    assert during - before > 150_000_000
    del held
    profiling.reset_peak_memory()
    after = profiling.peak_rss_bytes()
    if after >= during:
        pytest.skip("this system does not reset the peak")
    assert during - after > 150_000_000


def test_the_machine_is_named() -> None:
    machine = profiling.machine()
    assert machine["threads"] >= 1
    assert machine["memory_bytes"] > 0
    assert isinstance(machine["cpu"], str)
