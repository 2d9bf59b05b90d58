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
from trdq_core.reconstruction.calls import RecordedCalls
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
    temporal = recorded.templates[TEMPORAL].inputs[0]
    assert recorded.values[temporal].shape == (recorded.count, PATCHES, FRAMES, 128)


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
    replay = Replay(clips.denoiser, recorded, find_blocks(clips.linears()), torch.device("cpu"))
    for name, kept in outputs.items():
        replay.enter(name)
        assert torch.allclose(replay.targets[0].flatten(0, 1), torch.cat(kept), atol=1e-4)


def test_a_linear_alone_whose_outputs_differ_in_length_is_refused(clips: LatteModel, seen: Statistics) -> None:
    recorded, blocks = record(clips, seen), find_blocks(clips.linears())
    replay = Replay(clips.denoiser, recorded, blocks, torch.device("cpu"))
    block = replay.enter(SPATIAL)
    read, returned = replay.inside(block, SPATIAL, replay.exact, block.ff.net[2])
    assert len(read) == len(returned) == recorded.count
    with pytest.raises(CalibrationError, match='transformer_blocks.1: .* differ in length .* use unit "block"'):
        replay.inside(block, SPATIAL, replay.exact, block.attn2.to_k)
