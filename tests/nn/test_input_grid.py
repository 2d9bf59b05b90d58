"""Grids of a linear's input: the integers of the kernels and the rounding in floating point are the same numbers."""

from __future__ import annotations

import pytest
import torch

from trdq_core.kernels import dispatch
from trdq_core.kernels.types import NO_STAGES
from trdq_core.nn.input_grid import InputGrid, range_of
from trdq_core.specs import QuantSpec

DYNAMIC = QuantSpec(bits=4, symmetric=False, granularity="token", dynamic=True)
STATIC = QuantSpec(bits=4, symmetric=False, granularity="tensor")


def rows() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 96) * torch.linspace(0.5, 4, 64)[:, None]


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_live_rounding_is_that_of_the_kernels(symmetric: bool, clip: float) -> None:
    x, spec = rows(), QuantSpec(bits=4, symmetric=symmetric, granularity="token", dynamic=True)
    integers = dispatch.quantize_activation(x, NO_STAGES, 4, symmetric, None, clip)
    values = (integers.values.float() - integers.zero_point[:, None]) * integers.scale[:, None]
    torch.testing.assert_close(InputGrid(spec, (clip,)).round(x), values)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_rounding_is_that_of_the_kernels(symmetric: bool) -> None:
    x, spec = rows(), QuantSpec(bits=4, symmetric=symmetric, granularity="tensor")
    grid = InputGrid(spec, ranges=((-1.0, 2.0), (-4.0, 8.0)))
    for index, static in enumerate(grid.static_grids()):
        integers = dispatch.quantize_activation(x, NO_STAGES, 4, symmetric, static)
        values = (integers.values.float() - integers.zero_point[:, None]) * integers.scale[:, None]
        torch.testing.assert_close(grid.round(x, index), values)


def test_one_clip_or_range_serves_every_group_and_several_are_told_apart() -> None:
    x = rows()
    assert torch.equal(InputGrid(DYNAMIC, (0.8,)).round(x, 3), InputGrid(DYNAMIC, (0.8,)).round(x, 0))
    two = InputGrid(DYNAMIC, (1.0, 0.5))
    assert torch.equal(two.round(x, 1), InputGrid(DYNAMIC, (0.5,)).round(x))
    assert not torch.equal(two.round(x, 1), two.round(x, 0))


def test_only_uniform_grids_for_tokens_or_tensors_are_integers() -> None:
    assert InputGrid(DYNAMIC).integer
    assert InputGrid(STATIC, ranges=((0.0, 1.0),)).integer
    assert not InputGrid(None).integer
    assert not InputGrid(QuantSpec(bits=4, granularity="group", group_size=32, dynamic=True)).integer
    assert not InputGrid(QuantSpec(bits=4, granularity="tensor", grid="twin_region"), ranges=((-0.2, 3.0),)).integer


def test_an_input_without_a_grid_stays_what_it_is() -> None:
    x = rows()
    assert InputGrid(None).round(x) is x


def test_two_regions_suit_what_gelu_leaves() -> None:
    x = torch.nn.functional.gelu(rows())
    twin = QuantSpec(bits=4, granularity="tensor", grid="twin_region", range="mse")
    plain = QuantSpec(bits=4, granularity="tensor", symmetric=False, range="mse")
    below = x < 0
    errors = [
        float((InputGrid(spec, ranges=(range_of(x, spec),)).round(x) - x)[below].square().mean())
        for spec in (twin, plain)
    ]
    assert errors[0] < errors[1] / 4, "values below zero, all of them small, get a step of their own"


def test_a_searched_range_is_never_worse_than_the_whole_one() -> None:
    x = rows()
    x[0, 0] = 100.0
    errors = {}
    for kind in ("minmax", "mse"):
        spec = QuantSpec(bits=4, symmetric=False, granularity="tensor", range=kind)
        grid = InputGrid(spec, ranges=(range_of(x, spec),))
        errors[kind] = float((grid.round(x) - x).square().sum())
    assert errors["mse"] <= errors["minmax"]
