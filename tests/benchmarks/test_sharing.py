"""The sharing benchmark on a small side: it runs, and its prediction is that of counted operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sharing
from trdq_core import branches
from trdq_core.adapters.roles import find_linears
from trdq_core.sharing import shared_copy
from trdq_core.specs import SharingSpec


def test_predicted_saving_is_that_of_a_flop_counter() -> None:
    denoiser, side = sharing.build(4), 4
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.full((2,), 500),
        "class_labels": torch.tensor([1000, 7]),
    }
    counts = []
    for blocks in ((), tuple(range(sharing.LAYERS))):
        copy, _, _ = shared_copy(denoiser, find_linears(denoiser), SharingSpec(blocks=(blocks,)))
        counter = FlopCounterMode(display=False)
        kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with torch.no_grad(), kernel, counter, branches.joint():
            copy(**inputs)
        found = counter.get_flop_counts()
        counts.append(sum(found[f"DiTTransformer2DModel.transformer_blocks.{i}"][op]
                          for i in range(sharing.LAYERS)
                          for op in found[f"DiTTransformer2DModel.transformer_blocks.{i}"]))  # fmt: skip
    # Modulation, a few rows a step, is counted by the counter alone.
    modulation = sharing.LAYERS * 2 * 2 * (sharing.CHANNELS * 6 * sharing.CHANNELS)
    saved = (counts[0] - counts[1]) / counts[0]
    assert saved <= sharing.predicted_saving(side**2, sharing.LAYERS)
    attention, gone = sharing.attention_flops(side**2, sharing.CHANNELS)
    assert counts[0] - counts[1] == sharing.LAYERS * gone
    assert counts[0] >= sharing.LAYERS * attention + modulation


def test_rounds_take_turns() -> None:
    order: list[str] = []
    seconds = sharing.measure({name: (lambda n=name: order.append(n)) for name in "ab"}, 2)
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert "".join(order) == "abbaab"


@pytest.mark.slow
def test_the_variants_share_what_they_say() -> None:
    denoisers = sharing.variants(sharing.build(4), "rtn")
    shared = {
        name: sum(type(block.attn1.processor).__name__ == "SharedAttention" for block in denoiser.transformer_blocks)
        for name, denoiser in denoisers.items()
    }
    assert shared == {"none": 0, "half": 6, "all": 12}
