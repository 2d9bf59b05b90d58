"""One tiny model with its calibration, converted by recipe; and pipelines loaded again by diffusers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tests.tiny import tiny_pipeline
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.saving import Saved, save_quantized
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion, convert, convert_sharing_only
from trdq_core.kernels import dispatch
from trdq_core.model_passes import make_passes
from trdq_core.sampling import sample
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics

STEPS = 3
Convert = Callable[[Recipe], Conversion]


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> PixArtModel:
    folder = tmp_path_factory.mktemp("models") / "one-block"
    tiny_pipeline(layers=1).save_pretrained(folder)
    return PixArtModel(folder)


@pytest.fixture(scope="package")
def statistics(model: PixArtModel) -> Statistics:
    return calibrate(model, ["red apple", "green salad"], steps=STEPS, guidance=3.5, seed=0)


@pytest.fixture(scope="package")
def convert_tiny(model: PixArtModel, statistics: Statistics, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    folder = tmp_path_factory.mktemp("sets")

    def build(recipe: Recipe) -> Conversion:
        if not recipe.quantized:
            return convert_sharing_only(model.denoiser, model.linears(), recipe)
        passes = make_passes(
            model, statistics, recipe, folder=folder, seed=0, announce=lambda stage, label: None,
            on_event=lambda event: None, cancelled=None,
        )  # fmt: skip
        return convert(
            model.denoiser, model.linears(), recipe, statistics,
            backend=dispatch.select_backend(torch.device("cpu")), storage_folder=folder, passes=passes,
        )  # fmt: skip

    return build


@pytest.fixture(scope="package")
def picture(model: PixArtModel) -> Callable[[nn.Module], Tensor]:
    """Final latents of a whole sampling, everything but the denoiser equal."""

    def run(denoiser: nn.Module) -> Tensor:
        with model.using(denoiser):
            return sample(model, model.encode(["tiger face"])[0], 1, steps=STEPS, guidance=3.5).latents[-1]

    return run


@pytest.fixture(scope="package")
def save(model: PixArtModel) -> Callable[..., Saved]:
    """Save the pipeline around a converted denoiser."""

    def write(conversion: Conversion, folder: Path, **options: object) -> Saved:
        with model.using(conversion.denoiser):
            return save_quantized(model.pipeline, folder, **options)

    return write


def reload(folder: Path, **options: object) -> nn.Module:
    """The denoiser of a pipeline that diffusers loaded."""
    return DiffusionPipeline.from_pretrained(folder, **options).transformer
