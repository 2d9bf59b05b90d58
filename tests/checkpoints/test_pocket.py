"""The pocket model itself: saved, loaded by diffusers in five lines, the same picture."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoints.conftest import reload
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.saving import save_quantized
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.kernels import dispatch
from trdq_core.presets import make_recipe
from trdq_core.sampling import sample


def test_pocket_image_comes_back_to_the_bit_and_weighs_what_its_bits_say(root: Path, tmp_path: Path) -> None:
    model = PixArtModel(root / "assets" / "pocket-image", "pocket-image")
    statistics = calibrate(model, ["red apple"], steps=2, guidance=3.5, seed=0)
    conditioning, sizes = model.encode(["a fox"])[0], {}
    for bits, method in ((8, "rtn"), (4, "tr-dq")):
        conversion = convert(
            model.denoiser, model.linears(), make_recipe(method, weight_bits=bits), statistics,
            backend=dispatch.select_backend(model.device), storage_folder=tmp_path,
        )  # fmt: skip
        with model.using(conversion.denoiser):
            live = sample(model, conditioning, 1, steps=2, guidance=3.5).latents[-1]
            sizes[bits] = save_quantized(model.pipeline, tmp_path / f"w{bits}").denoiser_bytes
        with model.using(reload(tmp_path / f"w{bits}")):
            again = sample(model, conditioning, 1, steps=2, guidance=3.5).latents[-1]
        assert torch.equal(again, live)
    full = sum(parameter.nbytes for parameter in model.denoiser.parameters())
    assert sizes[4] < sizes[8] < 0.4 * full
