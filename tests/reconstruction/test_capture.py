"""Recording calls and replaying them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.errors import CalibrationError
from trdq_core.events import Progress
from trdq_core.reconstruction import capture
from trdq_core.reconstruction.calls import BatchSize, RecordedCalls
from trdq_core.reconstruction.capture import CallRecorder, EvenChoice, record_calls
from trdq_core.reconstruction.replay import Replay
from trdq_core.statistics import Statistics

BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")
CPU = torch.device("cpu")


def record(model: PixArtModel, statistics: Statistics, *, items: int = 384) -> RecordedCalls:
    return record_calls(model, BLOCKS, (), statistics, lambda total: Progress("observe", total), items=items)


def test_depth_costs_no_memory(model: PixArtModel, statistics: Statistics) -> None:
    recorded = record(model, statistics)
    assert recorded.count == 2 * 4 * 2  # prompts, steps, branches
    assert sorted(recorded.values) == [f"{BLOCKS[0]}#{i}" for i in range(4)]  # hidden states, text, mask, modulation
    hidden = recorded.templates[BLOCKS[1]].inputs[0]
    assert hidden == recorded.templates[BLOCKS[0]].outputs[0] == "transformer_blocks.0/0"
    assert recorded.branches.tolist()[:4] == [0, 1, 0, 1]
    assert recorded.timesteps.unique().numel() == 4


def test_replaying_gives_what_was_sampled(model: PixArtModel, statistics: Statistics) -> None:
    seen: list[Tensor] = []
    last = model.denoiser.get_submodule(BLOCKS[1])
    handle = last.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    recorded = record(model, statistics)
    handle.remove()
    replay = Replay(model.denoiser, recorded, BLOCKS, CPU)
    replay.enter(BLOCKS[1])
    assert torch.allclose(replay.targets[0], torch.cat(seen), atol=1e-4)
    replay.leave()
    assert not replay.exact and not replay.quantized  # nothing further reads them


def test_fewer_items_are_spread_over_prompts_and_timesteps(model: PixArtModel, statistics: Statistics) -> None:
    recorded = record(model, statistics, items=8)
    assert recorded.count == 8
    assert recorded.prompts.bincount().tolist() == [4, 4]
    assert recorded.timesteps.unique().numel() >= 3
    assert record(model, statistics, items=2).prompts.tolist() == [0, 0]


def test_a_large_model_is_recorded_at_fewer_timesteps(
    model: PixArtModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MEMORY", 400_000)
    recorded = record(model, statistics)
    assert recorded.count < 16
    stored = sum(tensor.nbytes for tensor in recorded.values.values())
    assert stored <= 400_000


def test_every_prompt_gets_the_same_number_of_different_calls() -> None:
    choice = EvenChoice(prompts=5, calls=20, wanted=30)
    steps = [choice.steps(prompt) for prompt in range(5)]
    assert all(len(chosen) == 6 and max(chosen) < 20 for chosen in steps)
    assert set.union(*steps) == set(range(20))


class Odd(nn.Module):
    """Calls its linear as its test wants."""

    def __init__(self, calls: list[Tensor]) -> None:
        super().__init__()
        self.linear, self.idle, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), calls

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(self.calls.pop(0))


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ([(2, 3, 2, 4), (2, 5, 2, 4)], "padded to one length"),
        ([(3, 4), (3, 4)], "cannot be cut into items"),
    ],
)
def test_calls_that_cannot_be_batched_are_refused(shapes: list[tuple[int, ...]], sentence: str) -> None:
    odd = Odd([torch.randn(shape) for shape in shapes])
    recorder = CallRecorder(odd, ["linear"], "timestep")
    with recorder.attached(), pytest.raises(CalibrationError, match=f"linear.*{sentence}"):
        for _ in shapes:
            odd(torch.zeros(2), timestep=torch.tensor(3.0))


def test_a_module_that_is_never_called_is_named() -> None:
    odd = Odd([torch.randn(2, 4)])
    recorder = CallRecorder(odd, ["idle"], "timestep")
    with recorder.attached():
        odd(torch.zeros(2), timestep=torch.tensor(3.0))
    with pytest.raises(CalibrationError, match="idle: the model never called it"):
        recorder.result()


def test_batch_sizes_follow_the_items(model: PixArtModel) -> None:
    recorder = CallRecorder(model.denoiser, ["adaln_single"], "timestep")
    parts = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "timestep": torch.tensor([5.0, 5.0]),
    }
    with recorder.attached(), torch.no_grad():
        model.denoiser(**parts)
    recorded = recorder.result()
    assert recorded.templates["adaln_single"].kwargs["batch_size"] == BatchSize()
    _, kwargs = recorded.arguments("adaln_single", torch.tensor([0, 0, 1]), {}, CPU)
    assert kwargs["batch_size"] == 3
