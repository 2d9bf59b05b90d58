"""A tiny PixArt, its calibration, and its linears fitted for learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.calibration import calibrate
from trdq_core.nn.input_grid import InputGrid
from trdq_core.reconstruction.units import UnitLinear
from trdq_core.specs import LayerRule, QuantSpec, Recipe, ReconstructionSpec
from trdq_core.statistics import Statistics
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.grids import fit_grid

WEIGHT = QuantSpec(bits=3, symmetric=False)
ACTIVATION = QuantSpec(bits=8, symmetric=False, granularity="token", dynamic=True)
BLOCK_ROLES = (
    "self_q", "self_k", "self_v", "self_out", "cross_q", "cross_k", "cross_v", "cross_out", "mlp_in", "mlp_out"
)  # fmt: skip
QUICK = ReconstructionSpec(iterations=40, batch=4, learning_rate=0.1)


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="session")
def statistics(model: PixArtModel) -> Statistics:
    return calibrate(model, ["red apple", "green salad"], steps=4, guidance=3.5, seed=0)


@pytest.fixture(scope="session")
def fit(model: PixArtModel) -> Callable[..., list[UnitLinear]]:
    """Linears of some roles on their grids."""

    def build(
        roles: Sequence[str] = BLOCK_ROLES, activation: QuantSpec | None = ACTIVATION, ranges: tuple = ()
    ) -> list[UnitLinear]:
        fitted = []
        for layer in model.linears():
            if layer.role in roles:
                weight = model.denoiser.get_submodule(layer.name).weight.detach().double()
                grid = fit_grid(weight, WEIGHT)
                linear = UnitLinear(layer.name, InputTransform(), weight, grid, InputGrid(activation, ranges=ranges))
                fitted.append(linear)
        return fitted

    return build


def make_recipe(spec: ReconstructionSpec = QUICK, **change: object) -> Recipe:
    rule = LayerRule(weight=WEIGHT, activation=ACTIVATION, rounding="adaround")
    return Recipe(name="learned", rules=(rule,), reconstruction=dataclasses.replace(spec, **change))
