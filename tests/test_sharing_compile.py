"""torch.compile over a denoiser that leaves work out: the same numbers, and whole graphs where nothing hinders them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trdq_core import branches
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.sharing import Sharing, shared_copy
from trdq_core.specs import SharingSpec

TIMES = (900.0, 700.0, 300.0)
SPECS = {
    "shared": SharingSpec(blocks=((0, 1),)),
    "everything": SharingSpec(
        blocks=((0,), (0, 1)), edges=(600.0,), across_steps=((1,), (1,)), skip_unconditional_below=400.0
    ),
}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def run(denoiser: nn.Module) -> list[Tensor]:
    """A run of three calls with both branches in one batch."""
    torch.manual_seed(0)
    text = torch.randn(2, 5, 32)
    found = []
    with branches.joint():
        for timestep in TIMES:
            latents = torch.randn(1, 4, 8, 8)
            found.append(
                denoiser(
                    torch.cat([latents, latents]), encoder_hidden_states=text, timestep=torch.full((2,), timestep),
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
                )[0]
            )  # fmt: skip
    return found


def copy_of(model: PixArtModel, name: str) -> tuple[nn.Module, Sharing]:
    denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), SPECS[name])
    return denoiser, sharing


@pytest.mark.parametrize("name", SPECS)
def test_a_compiled_denoiser_leaves_out_the_same(model: PixArtModel, name: str) -> None:
    eager, counted = copy_of(model, name)
    expected = run(eager)
    denoiser, sharing = copy_of(model, name)
    compiled = torch.compile(denoiser, backend="eager")
    found = run(compiled)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    calls = {key: value for key, value in counted.facts().items() if key.endswith("_calls")}
    assert {key: sharing.facts()[key] for key in calls} == calls


def test_a_block_with_shared_attention_is_one_graph(model: PixArtModel) -> None:
    denoiser, sharing = copy_of(model, "shared")
    attention = denoiser.transformer_blocks[1].attn1
    x = torch.randn(4, 16, 128)
    with branches.joint():
        expected = attention(x)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        sharing.processors[1].prepare()
        assert torch.allclose(compiled(x), expected, atol=1e-6)
        assert torch.allclose(compiled(2 * x), attention(2 * x), atol=1e-6)
    assert sharing.processors[1].shared_calls == 4
    assert sharing.processors[1].plain_calls == 0
    sharing.processors[1].prepare()
    assert torch.allclose(compiled(x), attention(x), atol=1e-6), "nobody says that there are two branches any more"
    assert sharing.processors[1].plain_calls == 2


def test_reuse_is_one_graph_too(model: PixArtModel) -> None:
    denoiser, sharing = copy_of(model, "everything")
    attention, reusing = denoiser.transformer_blocks[1].attn1, sharing.reusing[1]
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    x, y = torch.randn(2, 2, 16, 128)
    with branches.joint():
        outputs = []
        for timestep, value in ((900.0, x), (800.0, y), (700.0, y)):
            reusing.collect()
            reusing.memory.time.set(timestep)
            reusing.memory.enter()
            reusing.prepare()
            reusing.inner.prepare()
            outputs.append(compiled(value))
    assert torch.equal(outputs[1], outputs[0])
    assert not torch.equal(outputs[2], outputs[1])
    assert (reusing.reused_calls, reusing.computed_calls) == (1, 2)
