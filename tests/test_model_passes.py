"""Learned rounding on its way through a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion, convert
from trdq_core.kernels import dispatch
from trdq_core.model_passes import make_passes
from trdq_core.specs import LayerRule, QuantSpec, Recipe, ReconstructionSpec
from trdq_core.statistics import Statistics

RULE = LayerRule(
    roles=("self_out", "mlp_in", "mlp_out"),
    weight=QuantSpec(bits=4),
    activation=QuantSpec(bits=8, granularity="token", dynamic=True),
    rounding="adaround",
)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def statistics(model: PixArtModel) -> Statistics:
    return calibrate(model, ["red apple", "green salad"], steps=3, guidance=3.5, seed=0)


def learn(model: PixArtModel, statistics: Statistics, folder: Path) -> Conversion:
    spec = ReconstructionSpec(iterations=15, batch=4, learning_rate=0.2)
    recipe = Recipe(name="learned", rules=(RULE,), reconstruction=spec)
    options = {"on_event": lambda event: None, "cancelled": None}
    passes = make_passes(
        model, statistics, recipe, folder=folder, seed=0, announce=lambda stage, label: None, **options
    )
    backend = dispatch.select_backend(torch.device("cpu"))
    return convert(
        model.denoiser, model.linears(), recipe, statistics, backend=backend, storage_folder=folder, passes=passes
    )


def test_what_was_learned_is_what_is_installed(model: PixArtModel, statistics: Statistics, tmp_path: Path) -> None:
    conversion = learn(model, statistics, tmp_path)
    units = conversion.facts()["reconstruction"]["units"]
    assert [unit["unit"] for unit in units] == ["transformer_blocks.0", "transformer_blocks.1"]
    # The whole denoiser errs about as little as its last unit said; a weight on a foreign grid would be far off.
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    with torch.no_grad():
        exact, got = (denoiser(**call).sample for denoiser in (model.denoiser, conversion.denoiser))
    assert (got - exact).square().sum() / exact.square().sum() < 0.01
    assert all(unit["error_nearest"] < 0.01 for unit in units)
