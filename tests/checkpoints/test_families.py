"""Every family of transformers: quantized, sampled, saved, loaded by diffusers, sampled again to the same bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adapters.tiny_families import FAMILIES, build, embeddings_of
from trdq_core.adapters.generic import TransformerModel
from trdq_core.adapters.saving import load_denoiser, save_quantized
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.kernels import dispatch
from trdq_core.presets import make_recipe
from trdq_core.sampling import sample

PROMPT, RUN = "red apple", {"steps": 2, "guidance": 3.0}
RECIPES = {
    "w8a8": make_recipe("rtn"),
    "w4a8": make_recipe("tr-dq", weight_bits=4, groups=2, group_kind="per_step"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_to_the_bit(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "full")
    model = TransformerModel(tmp_path / "full", size=FAMILIES[family].size)
    model.provide(PROMPT, embeddings_of(family, PROMPT))
    conditioning = model.encode([PROMPT])[0]
    statistics = calibrate(model, [PROMPT], seed=0, **RUN)
    for name, recipe in RECIPES.items():
        conversion = convert(
            model.denoiser, model.linears(), recipe, statistics, argument=model.timestep_argument,
            backend=dispatch.select_backend(torch.device("cpu")), storage_folder=tmp_path / "sets",
        )  # fmt: skip
        with model.using(conversion.denoiser):
            live = sample(model, conditioning, 0, **RUN).latents[-1]
            saved = save_quantized(model.pipeline, tmp_path / name)
        loaded = load_denoiser(saved.folder, type(conversion.denoiser))
        with model.using(loaded):
            again = sample(model, conditioning, 0, **RUN).latents[-1]
        assert torch.isfinite(live).all()
        assert torch.equal(again, live), name
        assert set(loaded.trdq_conversion.quantized_layers()) == set(conversion.quantized_layers()) != set()
