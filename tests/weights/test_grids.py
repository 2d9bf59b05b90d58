"""Invariants 11-19 and 25 of grids fitted to weights, whatever their kind; ranges by output error."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from trdq_core.errors import CalibrationError, ShapeError
from trdq_core.specs import QuantSpec
from trdq_core.weights.grids import TwoLevelGrid, UniformGrid, fit_grid
from trdq_core.weights.ranges import Curvature
from trdq_core.weights.rounding import QuantizedWeight, dequantize_weight, quantize_weight

GRIDS = {
    "channel": {"granularity": "channel"},
    "channel asymmetric": {"granularity": "channel", "symmetric": False},
    "tensor": {"granularity": "tensor"},
    "tensor asymmetric": {"granularity": "tensor", "symmetric": False},
    "group": {"granularity": "group", "group_size": 32},  # with four bits in two levels
    "group asymmetric": {"granularity": "group", "group_size": 32, "symmetric": False},
    "twin_log": {"grid": "twin_log"},
}
RANGES = ("minmax", "mse", "percentile", "output")


@cache
def heavy_tails() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((24, 128)) * 0.02


def weight() -> torch.Tensor:
    return heavy_tails().clone()


def inputs(rows: int = 64, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp()


def rounded(spec: QuantSpec, values: torch.Tensor | None = None) -> torch.Tensor:
    values = weight() if values is None else values
    return fit_grid(values, spec, inputs=inputs()).nearest(values)


def error(spec: QuantSpec) -> float:
    return float((rounded(spec) - weight()).square().sum())


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 8))
@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("name", GRIDS)
def test_invariant_11_values_on_the_grid_stay_and_come_back_from_their_codes(name: str, range_: str, bits: int) -> None:
    spec = QuantSpec(bits=bits, range=range_, **GRIDS[name])
    grid = fit_grid(weight(), spec, inputs=inputs())
    values = grid.nearest(weight())
    assert torch.allclose(grid.nearest(values), values, rtol=1e-12, atol=0)
    stored = grid.encode(values)
    assert stored.bits == bits
    assert torch.equal(dequantize_weight(stored), values)
    assert isinstance(stored, QuantizedWeight) == (
        name not in ("group", "group asymmetric", "twin_log") or spec.two_level
    )


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("name", GRIDS)
def test_invariant_12_each_group_has_at_most_two_to_the_bits_levels(name: str, bits: int) -> None:
    many = torch.randn(2, 4096, generator=torch.Generator().manual_seed(2))
    wide = {"group_size": 2048} if "group" in name else {}
    values = rounded(QuantSpec(bits=bits, range="mse", **(GRIDS[name] | wide)), many)
    assert all(part.unique().numel() <= 2**bits for part in values.reshape(4, 2048))


@pytest.mark.parametrize("name", GRIDS)
def test_invariant_13_zero_is_exact_and_errors_are_half_a_gap(name: str) -> None:
    values = weight()
    values[:, 7] = 0
    grid = fit_grid(values, QuantSpec(bits=4, **GRIDS[name]))
    assert (grid.nearest(values)[:, 7] == 0).all()
    below, above = grid.neighbours(values)
    inside = below < above
    limit = (above - below)[inside] / 2
    assert ((grid.nearest(values) - values).abs()[inside] <= limit * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", GRIDS)
def test_invariant_14_order_is_kept(name: str) -> None:
    values = weight().sort(1).values
    steps = rounded(QuantSpec(bits=4, **GRIDS[name]), values).reshape(24, -1, 32).diff(dim=2)
    assert (steps >= 0).all()


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("name", GRIDS)
def test_invariant_15_scaling_the_weight_scales_the_result(name: str, range_: str) -> None:
    spec = QuantSpec(bits=4, range=range_, **GRIDS[name])
    assert torch.allclose(rounded(spec, 16 * weight()), 16 * rounded(spec), rtol=1e-9, atol=0)


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("name", [name for name in GRIDS if "asymmetric" not in name])
def test_invariant_16_symmetric_grids_are_odd(name: str, range_: str) -> None:
    spec = QuantSpec(bits=4, range=range_, **GRIDS[name])
    assert torch.equal(rounded(spec, -weight()), -rounded(spec))


@pytest.mark.parametrize("name", GRIDS)
def test_invariant_17_more_bits_never_hurt(name: str) -> None:
    errors = [error(QuantSpec(bits=bits, range="mse", **GRIDS[name])) for bits in (2, 3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", (3, 4, 8))
def test_invariant_18_finer_ranges_never_hurt(bits: int, symmetric: bool) -> None:
    grid = {"bits": bits, "symmetric": symmetric, "range": "mse"}
    group = error(QuantSpec(**grid, granularity="group", group_size=32))
    channel, tensor = (error(QuantSpec(**grid, granularity=g)) for g in ("channel", "tensor"))
    assert group <= 1.02 * channel <= 1.02**2 * tensor


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("name", GRIDS)
def test_invariant_19_a_searched_range_is_never_worse_than_min_max(name: str, bits: int) -> None:
    searched, plain = (error(QuantSpec(bits=bits, range=r, **GRIDS[name])) for r in ("mse", "minmax"))
    assert searched <= plain * (1 + 1e-12)


@pytest.mark.parametrize("curvature", ["none", "outputs", "rows"])
@pytest.mark.parametrize("name", GRIDS)
def test_a_range_by_output_error_has_the_least_of_it(name: str, curvature: str) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = {"none": None, "outputs": (24,), "rows": (64, 24)}[curvature]
    output_weight = None if sizes is None else torch.rand(sizes, generator=generator) ** 4

    def output_error(range_: str) -> float:
        spec = QuantSpec(bits=4, range=range_, **GRIDS[name])
        grid = fit_grid(weight(), spec, inputs=inputs(), output_weight=output_weight)
        change = inputs().double() @ (grid.nearest(weight()) - weight()).T
        return float((change.square() * (1 if output_weight is None else output_weight)).sum())

    # Groups are searched one at a time, as if the others did not change, so only whole rows are sure to gain.
    slack = 1.1 if "group" in name else 1 + 1e-5
    assert output_error("output") <= slack * output_error("minmax")


def test_output_errors_agree_with_their_definition() -> None:
    generator = torch.Generator().manual_seed(4)
    difference, rows = torch.randn(5, 16, generator=generator), torch.randn(40, 16, generator=generator)
    for output_weight in (None, torch.rand(5, generator=generator), torch.rand(40, 5, generator=generator)):
        expected = (rows @ difference.T).square() * (1 if output_weight is None else output_weight)
        got = Curvature(rows, output_weight, (5, 16), "fc1").error(difference, 16)
        assert torch.allclose(got[:, 0].float(), expected.sum(0), rtol=1e-4)
        halves = Curvature(rows, output_weight, (5, 16), "fc1").error(difference, 8)
        left = (rows[:, :8] @ difference[:, :8].T).square() * (1 if output_weight is None else output_weight)
        assert torch.allclose(halves[:, 0].float(), left.sum(0), rtol=1e-4)


@pytest.mark.parametrize("name", GRIDS)
def test_columns_can_be_rounded_one_at_a_time(name: str) -> None:
    values = weight()
    grid = fit_grid(values, QuantSpec(bits=4, **GRIDS[name]))
    whole = grid.nearest(values)
    assert torch.equal(torch.cat([grid.nearest(values[:, i : i + 1], i) for i in range(128)], 1), whole)
    assert torch.equal(grid.nearest(values[:, 40:100], 40), whole[:, 40:100])


@pytest.mark.parametrize("name", GRIDS)
def test_beyond_the_ends_both_neighbours_are_the_end(name: str) -> None:
    values = weight()
    grid = fit_grid(values, QuantSpec(bits=3, clip=0.5, **GRIDS[name]))
    ends = [grid.nearest(torch.full_like(values, far)) for far in (-1e3, 1e3)]
    for far, end in zip((-1e3, 1e3), ends, strict=True):
        below, above = grid.neighbours(torch.full_like(values, far))
        assert torch.equal(below, end)
        assert torch.equal(above, end)
    assert (ends[0] <= 0).all()
    assert (ends[1] > ends[0]).all()


def test_clip_and_percentile_shorten_the_range() -> None:
    plain, clipped = (rounded(QuantSpec(bits=4, clip=clip)).abs().amax(1) for clip in (1.0, 0.8))
    assert torch.allclose(clipped, 0.8 * plain, rtol=1e-6)
    for name in GRIDS:
        spec = QuantSpec(bits=4, range="percentile", percentile=90.0, **GRIDS[name])
        assert rounded(spec).abs().max() < weight().abs().max()


def test_four_symmetric_bits_in_groups_are_two_levels_and_others_floats() -> None:
    size = {"granularity": "group", "group_size": 32}
    assert isinstance(fit_grid(weight(), QuantSpec(bits=4, **size)), TwoLevelGrid)
    for spec in (QuantSpec(bits=3, **size), QuantSpec(bits=4, symmetric=False, **size)):
        assert isinstance(fit_grid(weight(), spec), UniformGrid)


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("name", GRIDS)
def test_invariant_25_zero_constant_and_huge_rows_stay_finite(name: str, range_: str) -> None:
    values = weight()
    values[0], values[1], values[2] = 0, -0.5, 65504.0
    restored = dequantize_weight(
        quantize_weight(values, QuantSpec(bits=4, range=range_, **GRIDS[name]), inputs=inputs())
    )
    assert torch.isfinite(restored).all()
    assert (restored[0] == 0).all()


def test_missing_or_foreign_inputs_are_one_sentence() -> None:
    spec = QuantSpec(bits=4, range="output")
    with pytest.raises(CalibrationError, match=r'blocks\.2\.fc2: range "output" .* needs sampled inputs'):
        fit_grid(weight(), spec, layer="blocks.2.fc2")
    with pytest.raises(ShapeError, match=r"fc2: got output_weight of shape \(3, 24\); give \(24,\) or \(64, 24\)"):
        fit_grid(weight(), spec, layer="fc2", inputs=inputs(), output_weight=torch.ones(3, 24))
    with pytest.raises(ShapeError, match=r"fc2: got inputs of shape \(64, 5\); .* needs \(rows, 128\)"):
        fit_grid(weight(), spec, layer="fc2", inputs=inputs()[:, :5])
