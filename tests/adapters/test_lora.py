"""LoRAs: refused for a quantized pipeline before anything is touched, fused into a full-precision one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_base, peft
from torch import Tensor

from tests.adapters.tiny_families import build
from trdq_core.adapters.families import time_by_name
from trdq_core.adapters.roles import find_linears
from trdq_core.data_free import convert_without_data
from trdq_core.errors import ModelError
from trdq_core.kernels import dispatch
from trdq_core.presets import parse_recipe

LAYER = {"flux": "transformer_blocks.0.attn.to_q", "sd3": "transformer_blocks.0.attn.to_q"}
NORM = "transformer_blocks.0.attn.norm_q.weight"
ADVICE = r"load the LoRA onto the original pipeline, call fuse_lora\(\) and unload_lora_weights\(\), then quantize"


def lora(family: str) -> dict[str, Tensor]:
    """A LoRA of rank 2 for one layer, by the names of diffusers."""
    name, generator = f"transformer.{LAYER[family]}", torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_A.weight": torch.randn(2, 64, generator=generator),
        f"{name}.lora_B.weight": torch.randn(64, 2, generator=generator),
    }


@pytest.fixture(params=LAYER)
def quantized(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """A tiny pipeline whose transformer was quantized where it stands."""
    pipeline = build(request.param)
    denoiser = pipeline.transformer
    backend = dispatch.select_backend(torch.device("cpu"))
    convert_without_data(
        denoiser, find_linears(denoiser), parse_recipe("rtn-w8a8"), backend=backend, argument=time_by_name(denoiser)
    )
    return pipeline


@pytest.fixture(params=[True, False], ids=["with peft", "without"])
def _peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if peft were there, or not: the refusal is ours either way."""
    for module in (lora_base, peft):
        monkeypatch.setattr(module, "USE_PEFT_BACKEND", request.param)


@pytest.mark.usefixtures("_peft")
def test_every_way_to_load_one_onto_a_quantized_pipeline_is_refused_and_changes_nothing(
    quantized: DiffusionPipeline,
) -> None:
    family = "flux" if "Flux" in type(quantized).__name__ else "sd3"
    denoiser = quantized.transformer
    before = copy.deepcopy(denoiser.state_dict())
    norm = {f"transformer.{NORM}": torch.full((32,), 7.0)}
    ways: list[Callable[[], object]] = [
        lambda: quantized.load_lora_weights(lora(family)),
        lambda: quantized.load_lora_weights(lora(family), adapter_name="x"),
        lambda: quantized.load_lora_weights({**lora(family), **norm}),
        lambda: quantized.load_lora_weights(norm),
        lambda: (
            quantized.load_lora_into_transformer(lora(family), network_alphas=None, transformer=denoiser)
            if family == "flux"
            else quantized.load_lora_into_transformer(lora(family), transformer=denoiser)
        ),
        lambda: denoiser.load_lora_adapter(lora(family)),
        lambda: denoiser.add_adapter(object()),
    ]
    for number, way in enumerate(ways):
        if number == 4 and not lora_base.USE_PEFT_BACKEND:
            continue  # diffusers itself asks for peft there
        with pytest.raises(ModelError, match=ADVICE):
            way()
    after = denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_full_precision_pipeline_is_left_to_diffusers() -> None:
    pipeline = build("sd3")
    if lora_base.USE_PEFT_BACKEND:
        pipeline.load_lora_weights(lora("sd3"))
        assert pipeline.get_list_adapters()
    else:
        with pytest.raises(ValueError, match="PEFT backend is required"):
            pipeline.load_lora_weights(lora("sd3"))
