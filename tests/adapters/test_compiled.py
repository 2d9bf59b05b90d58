"""torch.compile over families with joint and parallel blocks: one graph, the same numbers; and through Inductor once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tests.adapters.tiny_families import FAMILIES, TEXT, TOKENS, build, embeddings_of
from trdq_core.adapters.families import time_by_name
from trdq_core.adapters.generic import TransformerModel
from trdq_core.adapters.roles import find_linears
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.data_free import convert_without_data
from trdq_core.kernels import dispatch
from trdq_core.nn.fused import unfused
from trdq_core.presets import make_recipe, parse_recipe

BACKEND = dispatch.select_backend(torch.device("cpu"))
SWITCHED = dataclasses.replace(make_recipe("tr-dq", weight_bits=4, groups=2), do_no_harm=False)


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def call(family: str, denoiser: nn.Module, timestep: float = 500.0) -> Tensor:
    """The prediction for made-up latents and text of a batch of two."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"encoder_hidden_states": torch.randn(2, TOKENS, TEXT, generator=generator)}
    if family == "flux":
        inputs |= {
            "hidden_states": torch.randn(2, 16, 16, generator=generator),
            "pooled_projections": torch.randn(2, 32, generator=generator),
            "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1),
            "txt_ids": torch.zeros(TOKENS, 3),
            "guidance": torch.full((2,), 3.5),
            "timestep": torch.full((2,), timestep / 1000),
        }
    else:
        inputs |= {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "pooled_projections": torch.randn(2, 64, generator=generator),
            "timestep": torch.full((2,), timestep),
        }
    return denoiser(**inputs, return_dict=False)[0]


def quantized(pipeline: DiffusionPipeline) -> nn.Module:
    """The transformer of a pipeline, quantized where it stands without a calibration."""
    denoiser = pipeline.transformer.eval()
    layers, time = find_linears(denoiser), time_by_name(denoiser)
    return convert_without_data(denoiser, layers, parse_recipe("rtn-w8a8"), backend=BACKEND, argument=time).denoiser


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_without_time_groups_it_is_one_graph(family: str) -> None:
    denoiser = quantized(build(family))
    with unfused():
        expected = call(family, denoiser)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    assert torch.equal(call(family, compiled), expected)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_held_group_of_switched_storage_is_one_graph(family: str, tmp_path: Path) -> None:
    model = TransformerModel.of(build(family), family, FAMILIES[family].size)
    model.provide("owl", embeddings_of(family, "owl"))
    statistics = calibrate(model, ["owl"], steps=2, guidance=1.0, seed=0)
    conversion = convert(
        model.denoiser, model.linears(), SWITCHED, statistics, backend=BACKEND, storage_folder=tmp_path,
        argument=model.timestep_argument,
    )  # fmt: skip
    assert conversion.switched is not None and conversion.switched.count == 2
    with unfused():
        expected = {timestep: call(family, conversion.denoiser, timestep) for timestep in (900.0, 100.0)}
    for timestep, output in expected.items():
        with conversion.time.held(timestep):
            compiled = torch.compile(conversion.denoiser, backend="eager", fullgraph=True)
            assert torch.equal(call(family, compiled, timestep), output)
            other = call(family, compiled, 1000.0 - timestep)  # the group stays where it is held
        assert not torch.equal(other, expected[1000.0 - timestep])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor takes a C++ compiler")
def test_inductor_compiles_quantized_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward: what Inductor makes of a whole block takes the C++ compiler half a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    part = quantized(build("flux")).transformer_blocks[0].ff
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    with unfused():
        expected = part(x)
    quick = {"cpp_cache_precompile_headers": False}  # so little is compiled that headers for more do not pay
    made = torch.compile(part, fullgraph=True, options=quick)(x)
    # Inductor rounds GELU otherwise, so a level of an activation may be the neighbouring one.
    assert (made - expected).norm() < 0.01 * expected.norm()
