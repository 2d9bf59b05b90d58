"""What is kept from step to step: what is reused when, in every call style, and that nothing outlives its run."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

from trdq_core import branches
from trdq_core.nn.attention import SharedAttention
from trdq_core.nn.steps import ReusingAttention, StepMemory
from trdq_core.timegroups import TimeContext, TimeGroups

TOKENS, CHANNELS = 12, 64


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


class Block:
    """One attention under a memory, called as a denoiser would call it."""

    def __init__(self, groups: TimeGroups | None = None, active: frozenset[int] = frozenset({0})) -> None:
        torch.manual_seed(0)
        self.attention = Attention(query_dim=CHANNELS, heads=2, dim_head=32, processor=AttnProcessor2_0())
        self.memory = StepMemory(TimeContext(TimeGroups()))
        self.plain = self.attention.processor
        self.reusing = ReusingAttention(self.plain, groups or TimeGroups(), active, self.memory)
        self.attention.set_processor(self.reusing)

    def __call__(self, timestep: float, x: torch.Tensor) -> torch.Tensor:
        self.memory.time.set(timestep)
        self.memory.enter()
        return self.attention(x)

    def fresh(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.attention, x)


def inputs(count: int, items: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(count, items, TOKENS, CHANNELS))


@pytest.mark.parametrize("steps", [2, 5])
def test_every_second_step_takes_the_output_of_the_one_before(steps: int) -> None:
    block, xs = Block(), inputs(steps)
    with branches.joint():
        outputs = [block(900.0 - 100 * i, x) for i, x in enumerate(xs)]
        assert block.memory.nbytes() <= 2 * xs[0].nbytes, "at most the outputs of one step"
    for i, output in enumerate(outputs):
        assert torch.equal(output, block.fresh(xs[i - i % 2]))
    assert (block.reusing.reused_calls, block.reusing.computed_calls) == (steps // 2, steps - steps // 2)
    assert block.memory.nbytes() == 0


def test_time_groups_say_when() -> None:
    block, xs = Block(TimeGroups((500.0,)), frozenset({0})), inputs(4)
    with branches.joint():
        outputs = [block(t, x) for t, x in zip((900.0, 600.0, 400.0, 100.0), xs, strict=True)]
    expected = [block.fresh(xs[i]) for i in (0, 1, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_a_run_begins_where_the_timestep_jumps_up_or_a_context_opens() -> None:
    block, xs = Block(), inputs(3)
    with branches.joint():
        block(900.0, xs[0])
        assert torch.equal(block(950.0, xs[1]), block.fresh(xs[1]))
        assert torch.equal(block(950.0, xs[2]), block.fresh(xs[2])), "the same timestep again is the same step"
    with branches.joint():
        assert torch.equal(block(900.0, xs[0]), block.fresh(xs[0]))
    block(900.0, xs[0])
    assert torch.equal(block(800.0, xs[1]), block.fresh(xs[1])), "without a run nothing is kept"
    assert block.reusing.reused_calls == 0


def test_an_exception_or_a_cancel_empties_the_memory() -> None:
    block, xs = Block(), inputs(2)
    with pytest.raises(RuntimeError, match="stop"), branches.joint():
        block(900.0, xs[0])
        assert block.memory.nbytes()
        raise RuntimeError("stop")
    assert block.memory.nbytes() == 0
    assert not block.memory.running
    with branches.joint():
        assert torch.equal(block(800.0, xs[1]), block.fresh(xs[1]))


def test_two_calls_keep_a_branch_each() -> None:
    together, apart, xs = Block(), Block(), inputs(4)
    with branches.joint():
        joint = [together(900.0 - 100 * i, x) for i, x in enumerate(xs)]
    halves = {"conditional": slice(1, None), "unconditional": slice(None, 1)}
    with branches.run():
        for i, x in enumerate(xs):
            with branches.two_calls() as step:
                order = list(halves) if i % 2 else list(reversed(halves))
                found = {}
                for branch in order:
                    with step.call(branch):
                        found[branch] = apart(900.0 - 100 * i, x[halves[branch]])
            own = torch.cat([found["unconditional"], found["conditional"]])
            assert torch.allclose(own, joint[i], atol=1e-6)
    assert apart.reusing.reused_calls == 4


def test_other_sizes_are_computed_and_single_branches_reused() -> None:
    block, xs = Block(), inputs(2)
    with branches.joint():
        block(900.0, xs[0])
        more = torch.cat([xs[1], xs[1]])
        assert torch.equal(block(800.0, more), block.fresh(more))
    with branches.single():
        block(900.0, xs[0])
        assert torch.equal(block(800.0, xs[1]), block.fresh(xs[0]))
    with branches.joint():
        text = torch.randn(2, 5, CHANNELS)
        block(900.0, xs[0])
        block.memory.time.set(800.0)
        block.memory.enter()
        crossed = block.attention(xs[1], text)
        assert torch.equal(crossed, block.plain(block.attention, xs[1], text)), "cross-attention is never reused"


def test_a_reused_output_costs_no_operation_and_wraps_a_shared_one() -> None:
    block, xs = Block(), inputs(3)
    shared = SharedAttention(block.plain, TimeGroups(), frozenset({0}), block.memory.time)
    block.reusing.inner = shared
    counts = []
    with branches.joint():
        for i, x in enumerate(xs):
            counter = FlopCounterMode(display=False)
            with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                block(900.0 - 100 * i, x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[2] > 0
    assert counts[1] == 0
    assert (shared.shared_calls, block.reusing.reused_calls) == (2, 1)
