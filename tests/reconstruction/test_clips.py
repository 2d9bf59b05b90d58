"""Learning the rounding of a video model: frames are parts of an item, texts have different lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trdq_core.adapters.latte import LatteModel
from trdq_core.calibration import calibrate
from trdq_core.errors import CalibrationError
from trdq_core.events import Progress
from trdq_core.reconstruction.calls import RecordedCalls, Slot
from trdq_core.reconstruction.capture import record_calls
from trdq_core.reconstruction.replay import Replay
from trdq_core.reconstruction.units import find_blocks
from trdq_core.statistics import Statistics

FRAMES, PATCHES, STEPS = 4, 16, 2
PROMPTS = ("green salad", "tiger", "red apple")  # three, two and three tokens
SPATIAL, TEMPORAL = "transformer_blocks.1", "temporal_transformer_blocks.1"


@pytest.fixture(scope="module")
def clips(tiny_video_folder: Path) -> LatteModel:
    return LatteModel(tiny_video_folder)


@pytest.fixture(scope="module")
def seen(clips: LatteModel) -> Statistics:
    return calibrate(clips, PROMPTS, steps=STEPS, guidance=3.0, seed=0)


def record(model: LatteModel, statistics: Statistics) -> RecordedCalls:
    blocks = find_blocks(model.linears())
    return record_calls(model, blocks, (), statistics, lambda total: Progress("observe", total))


def test_blocks_over_frames_are_blocks(clips: LatteModel) -> None:
    names = ("transformer_blocks", "temporal_transformer_blocks")
    assert find_blocks(clips.linears()) == tuple(f"{name}.{number}" for name in names for number in (0, 1))


def test_calls_are_cut_into_clips(clips: LatteModel, seen: Statistics) -> None:
    recorded = record(clips, seen)
    assert recorded.count == 2 * STEPS * len(PROMPTS)
    hidden, text, modulation = recorded.templates["transformer_blocks.0"].inputs
    assert {hidden, text, modulation} <= recorded.parted
    assert recorded.values[hidden].shape == (recorded.count, FRAMES, PATCHES, 128)
    assert recorded.values[text].shape == (recorded.count, FRAMES, 3, 128)
    assert recorded.lengths.keys() == {text}
    assert recorded.lengths[text].tolist() == [3] * 4 + [2] * 4 + [3] * 4


def test_blocks_within_and_across_frames_hand_on_what_is_rearranged(clips: LatteModel, seen: Statistics) -> None:
    recorded = record(clips, seen)
    turns = [f"{name}.{number}" for number in (0, 1) for name in ("transformer_blocks", "temporal_transformer_blocks")]
    assert list(recorded.templates) == turns, "in the order of the calls"
    first = recorded.templates["temporal_transformer_blocks.0"].args[0]
    assert (first.key, first.moved) == ("transformer_blocks.0/0", True)
    positions = clips.denoiser.temp_pos_embed[0]
    assert torch.allclose(recorded.constants[first.offset], positions, atol=1e-5)
    for name, before in (("transformer_blocks.1", "temporal_transformer_blocks.0"), (TEMPORAL, SPATIAL)):
        assert recorded.templates[name].args[0] == Slot(f"{before}/0", moved=True)
    hidden = [key for key, value in recorded.values.items() if value.shape[1:] == (FRAMES, PATCHES, 128)]
    assert len(hidden) == 1, "depth costs no memory"


def test_a_block_reads_what_the_decided_ones_before_it_leave(clips: LatteModel, seen: Statistics) -> None:
    recorded = record(clips, seen)
    replay = Replay(clips.denoiser, recorded, list(recorded.templates), torch.device("cpu"))
    block = replay.enter("transformer_blocks.0")
    block.ff.net[2] = torch.nn.Linear(512, 128)
    replay.enter("temporal_transformer_blocks.0")
    exact, changed = replay.exact["transformer_blocks.0/0"], replay.quantized["transformer_blocks.0/0"]
    assert exact.shape == changed.shape == (recorded.count, FRAMES, PATCHES, 128)
    assert not torch.allclose(exact, changed)
    args, _ = recorded.arguments(
        "temporal_transformer_blocks.0", torch.tensor([1]), replay.quantized, torch.device("cpu")
    )
    positions = clips.denoiser.temp_pos_embed[0]
    assert torch.allclose(args[0], changed[1].transpose(0, 1) + positions, atol=1e-5)


def test_items_of_one_length_go_together(clips: LatteModel, seen: Statistics) -> None:
    recorded = record(clips, seen)
    batches = list(recorded.batches(torch.arange(recorded.count), 3))
    assert sorted(torch.cat(batches).tolist()) == list(range(recorded.count))
    (length,) = recorded.lengths.values()
    assert all(len(length[items].unique()) == 1 and len(items) <= 3 for items in batches)
    generator = torch.Generator().manual_seed(0)
    drawn = [recorded.draw(torch.arange(recorded.count), 2, generator) for _ in range(150)]
    assert all(len(length[items].unique()) == 1 for items in drawn)
    counts = torch.cat(drawn).bincount(minlength=recorded.count).double()
    assert counts.min() > 10 and counts.max() < 45, "300 draws of 12 items, 25 each on average"


def test_replaying_gives_what_was_sampled(clips: LatteModel, seen: Statistics) -> None:
    outputs: dict[str, list[Tensor]] = {SPATIAL: [], TEMPORAL: []}
    handles = [
        clips.denoiser.get_submodule(name).register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        for name, kept in outputs.items()
    ]
    recorded = record(clips, seen)
    for handle in handles:
        handle.remove()
    replay = Replay(clips.denoiser, recorded, list(recorded.templates), torch.device("cpu"))
    for name, kept in outputs.items():
        replay.enter(name)
        assert torch.allclose(replay.targets[0].flatten(0, 1), torch.cat(kept), atol=1e-4)


def test_a_linear_alone_whose_outputs_differ_in_length_is_refused(clips: LatteModel, seen: Statistics) -> None:
    recorded = record(clips, seen)
    replay = Replay(clips.denoiser, recorded, list(recorded.templates), torch.device("cpu"))
    block = replay.enter(SPATIAL)
    read, returned = replay.inside(block, SPATIAL, replay.exact, block.ff.net[2])
    assert len(read) == len(returned) == recorded.count
    with pytest.raises(CalibrationError, match='transformer_blocks.1: .* differ in length .* use unit "block"'):
        replay.inside(block, SPATIAL, replay.exact, block.attn2.to_k)
