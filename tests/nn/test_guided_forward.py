"""Leaving out the unconditional branch: what the sampler gets, in one batch and two calls, and what is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trdq_core import branches
from trdq_core.errors import ShapeError
from trdq_core.nn.guided_forward import GuidedForward, first_tensor, with_first
from trdq_core.nn.steps import StepMemory
from trdq_core.specs import SkippedGuidance
from trdq_core.timegroups import TimeContext, TimeGroups

SCALE = 3.5


class Denoiser(nn.Module):
    """Something whose output depends on every input, that remembers the batch sizes it was called with."""

    def __init__(self, guidance: SkippedGuidance = "held", below: float | None = 500.0) -> None:
        super().__init__()
        self.time = TimeContext(TimeGroups())
        self.time.attach(self)
        self.memory = StepMemory(self.time)
        self.batches: list[int] = []
        self.guided = self.forward = GuidedForward(self._plain, self.memory, (), below, guidance)

    def _plain(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, extra: Any = None, return_dict: bool = True
    ) -> Any:
        self.batches.append(len(hidden_states))
        size = extra["size"] if extra else 0.0
        return (hidden_states * text[:, :, None, None] + timestep[:, None, None, None] / 1000 + size, "rest")


def call(denoiser: Denoiser, timestep: float, latents: Tensor, text: Tensor) -> Tensor:
    items = len(latents)
    extra = {"size": torch.ones(items, 1, 1, 1), "none": None}
    output = denoiser(latents, timestep=torch.full((items,), timestep), text=text, extra=extra)
    assert output[1] == "rest"
    return output[0]


def inputs(prompts: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    latents = [torch.randn(prompts, 4, 3, 3) for _ in range(4)]
    return [torch.cat([x, x]) for x in latents], torch.randn(2 * prompts, 4)


TIMES = (900.0, 600.0, 400.0, 100.0)


def guided(output: Tensor) -> Tensor:
    unconditional, conditional = output.chunk(2)
    return unconditional + SCALE * (conditional - unconditional)


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("guidance", ["held", "off"])
def test_the_sampler_gets_the_conditional_prediction_and_the_last_difference(prompts: int, guidance: str) -> None:
    latents, text = inputs(prompts)
    denoiser, plain = Denoiser(guidance), Denoiser(below=None)
    with branches.joint():
        full = [call(plain, t, x, text) for t, x in zip(TIMES, latents, strict=True)]
        found = [call(denoiser, t, x, text) for t, x in zip(TIMES, latents, strict=True)]
    assert denoiser.batches == [2 * prompts, 2 * prompts, prompts, prompts]
    assert (denoiser.guided.skipped_calls, plain.guided.skipped_calls) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(found[:2], full[:2], strict=True))
    last = full[1].chunk(2)[1] - full[1].chunk(2)[0]
    for output, whole in zip(found[2:], full[2:], strict=True):
        conditional = whole.chunk(2)[1]
        expected = conditional + (SCALE - 1) * last if guidance == "held" else conditional
        assert torch.allclose(guided(output), expected, atol=1e-5)
        assert torch.equal(output.chunk(2)[1], conditional)


def test_two_calls_leave_out_the_second() -> None:
    latents, text = inputs(2)
    joint, apart = Denoiser(), Denoiser()
    with branches.joint():
        expected = [call(joint, t, x, text) for t, x in zip(TIMES, latents, strict=True)]
    with branches.run():
        for t, x, whole in zip(TIMES, latents, expected, strict=True):
            with branches.two_calls() as step:
                with step.call("conditional"):
                    conditional = call(apart, t, x[2:], text[2:])
                with step.call("unconditional"):
                    unconditional = call(apart, t, x[:2], text[:2])
            assert torch.allclose(torch.cat([unconditional, conditional]), whole, atol=1e-6)
            assert not step.kept
    assert apart.batches == [2, 2, 2, 2, 2, 2], "two calls at two steps, one at the other two"


def test_an_unconditional_call_that_comes_first_is_computed() -> None:
    latents, text = inputs(1)
    denoiser = Denoiser()
    with branches.run():
        for t, x in zip(TIMES, latents, strict=True):
            with branches.two_calls() as step:
                for branch, rows in (("unconditional", slice(None, 1)), ("conditional", slice(1, None))):
                    with step.call(branch):
                        plain = denoiser._plain(x[rows], torch.full((1,), t), text[rows], {"size": 1.0})[0]
                        assert torch.equal(call(denoiser, t, x[rows], text[rows]), plain)
    assert denoiser.guided.skipped_calls == 0


def test_guidance_one_and_untagged_calls_are_left_alone() -> None:
    latents, text = inputs(2)
    denoiser = Denoiser("off")
    with branches.single():
        call(denoiser, 100.0, latents[0], text)
    call(denoiser, 100.0, latents[0], text)
    assert denoiser.batches == [4, 4]


def test_without_a_known_difference_a_step_is_computed() -> None:
    latents, text = inputs(1)
    denoiser = Denoiser()
    for cancelled in (True, False):
        with branches.joint():
            call(denoiser, 400.0, latents[0], text)
            if not cancelled:
                call(denoiser, 300.0, latents[1], text)
        assert denoiser.memory.direction is None, "it is let go with its run"
    assert denoiser.batches == [2, 2, 1]
    with branches.joint(), pytest.raises(RuntimeError, match="stop"):
        call(denoiser, 900.0, latents[0], text)
        raise RuntimeError("stop")


def test_bad_batches_are_refused_in_words() -> None:
    latents, text = inputs(2)
    with branches.joint():
        with pytest.raises(ShapeError, match="guidance: got a batch of 3; .* must be even"):
            call(Denoiser(), 900.0, latents[0][:3], text[:3])
        denoiser = Denoiser()
        call(denoiser, 900.0, latents[0], text)
        with pytest.raises(ShapeError, match="keep the batch and size the same"):
            call(denoiser, 400.0, latents[0][1:3], text[1:3])


def test_predictions_are_found_in_whatever_a_denoiser_returns() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    value, other = torch.zeros(1), torch.ones(1)
    for output in (value, (value, 1), Transformer2DModelOutput(sample=value)):
        assert first_tensor(output) is value
        changed = with_first(output, other)
        assert type(changed) is type(output)
        assert first_tensor(changed) is other
