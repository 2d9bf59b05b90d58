"""A loaded model under torch.compile and under the offloading of accelerate: the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from tests.checkpoints.conftest import Convert
from trdq_core.adapters.saving import save_quantized
from trdq_core.errors import StorageError
from trdq_core.kernels import dispatch
from trdq_core.nn.fused import unfused
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.presets import make_recipe, parse_recipe
from trdq_core.specs import Recipe

SWITCHED = dataclasses.replace(make_recipe("tr-dq", weight_bits=4, groups=2), do_no_harm=False)
Load = Callable[[Recipe], PixArtTransformer2DModel]


@pytest.fixture
def load(convert_tiny: Convert, tmp_path: Path) -> Load:
    def build(recipe: Recipe) -> PixArtTransformer2DModel:
        save_quantized(convert_tiny(recipe), tmp_path / recipe.name)
        return PixArtTransformer2DModel.from_pretrained(tmp_path / recipe.name)

    return build


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def call(denoiser: nn.Module, timestep: float = 500.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "timestep": torch.tensor([timestep, timestep]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return denoiser(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", ["rtn-w8a8", "tr-dq-w4a8", "q-dit-w4a8"])
def test_a_denoiser_without_time_groups_is_one_graph(load: Load, name: str) -> None:
    denoiser = load(parse_recipe(name))
    with unfused():
        expected = call(denoiser)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    assert torch.equal(call(compiled), expected)
    assert denoiser.hf_quantizer.is_compileable


def test_a_held_time_group_is_one_graph(load: Load) -> None:
    denoiser = load(dataclasses.replace(SWITCHED, storage="resident"))
    time = denoiser.trdq_conversion.time
    with unfused():
        expected = {timestep: call(denoiser, timestep) for timestep in (100.0, 900.0)}
    assert not torch.equal(expected[100.0], expected[900.0])
    for timestep, output in expected.items():
        with time.held(timestep):
            compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True)
            assert torch.equal(call(compiled, timestep), output)


def test_compiled_time_groups_are_followed(load: Load) -> None:
    denoiser = load(SWITCHED)
    timesteps = (900.0, 700.0, 300.0, 100.0, 800.0)
    with unfused():
        expected = [call(denoiser, timestep) for timestep in timesteps]
    compiled = torch.compile(denoiser, backend="eager")
    assert all(torch.equal(call(compiled, t), e) for t, e in zip(timesteps, expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_moving_replaces_buffers_and_switching_finds_the_new_ones(load: Load) -> None:
    denoiser = load(SWITCHED)
    expected = [call(denoiser, timestep) for timestep in (900.0, 100.0)]
    for module in denoiser.modules():  # what .to(device) and state dictionaries assigned in place leave behind
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    denoiser.to("cpu")
    assert torch.equal(call(denoiser, 900.0), expected[0])
    assert torch.equal(call(denoiser, 100.0), expected[1])
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    denoiser.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(call(denoiser, 100.0), expected[1])
    assert torch.equal(call(denoiser, 900.0), expected[0])


def test_model_offload_gives_the_same(load: Load) -> None:
    denoiser = load(SWITCHED)
    expected = [call(denoiser, timestep) for timestep in (900.0, 100.0)]
    denoiser, hook = cpu_offload_with_hook(denoiser, execution_device="cpu")
    assert torch.equal(call(denoiser, 900.0), expected[0])
    hook.offload()
    assert torch.equal(call(denoiser, 100.0), expected[1])


def test_a_model_that_is_moved_takes_kernels_of_the_device(load: Load) -> None:
    denoiser = load(parse_recipe("rtn-w8a8"))
    quantizer = denoiser.transformer_blocks[0].attn1.to_q.input_quantizer
    here = dispatch.select_backend(torch.device("cpu"))
    assert quantizer.backend == here
    quantizer.backend = "triton"  # as a model that comes back from a GPU has it
    denoiser.to("cpu")
    assert quantizer.backend == here
    quantizer.backend = "reference"  # asked for by name: it runs anywhere, so it stays
    denoiser.to("cpu")
    assert quantizer.backend == "reference"


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("name", ["rtn-w8a8", "tr-dq-w4a8", "svdquant-w4a4"])
def test_sequential_offload_gives_the_same(load: Load, name: str, offload_buffers: bool) -> None:
    denoiser = load(parse_recipe(name))
    with unfused():
        expected = call(denoiser)
    for module in denoiser.modules():
        if isinstance(module, (QuantizedLinear, InputQuantizer)):
            module.refresh()  # what was derived from the buffers must not be what saves the day
    cpu_offload(denoiser, execution_device="cpu", offload_buffers=offload_buffers)
    assert denoiser.proj_out.weight.is_meta
    layer = denoiser.transformer_blocks[0].attn1.to_q
    assert (layer.qweight if layer.integer else layer.codes).is_meta == offload_buffers
    for _ in range(2):
        assert torch.equal(call(denoiser), expected)


def test_switched_sets_do_not_go_with_offloaded_buffers(load: Load) -> None:
    denoiser = load(SWITCHED)
    call(denoiser, 900.0)
    cpu_offload(denoiser, execution_device="cpu", offload_buffers=True)
    with pytest.raises(StorageError, match="use enable_model_cpu_offload"):
        call(denoiser, 100.0)
