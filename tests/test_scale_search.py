"""Scales of weights and inputs in turns: against an exhaustive search, with and without output weights."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import CalibrationError
from trdq_core.numerics.affine import choose_qparams
from trdq_core.scale_search import (
    SearchedScales,
    input_ranges,
    quantize_inputs,
    search_activation_range,
    search_scales,
    sign_grid,
)
from trdq_core.specs import QuantSpec
from trdq_core.weights.grids import fit_grid

W4 = QuantSpec(bits=4, granularity="tensor", range="output")
A4 = QuantSpec(bits=4, granularity="tensor", range="output")
A4_ASYMMETRIC = QuantSpec(bits=4, symmetric=False, granularity="tensor", range="output")


def rows(count: int = 64, width: int = 24) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(count, width) + 0.5
    x[3, 5] = 30.0  # one spike that is worth clipping
    return x


def weights(names: str = "qk", width: int = 24) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(16, width) * (i + 1) for i, name in enumerate(names)}


def error(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, limits: tuple[float, float], spec: QuantSpec,
          output_weight: torch.Tensor | None = None) -> float:  # fmt: skip
    wrong = (quantize_inputs(x, spec, limits) @ values.float().T - x @ weight.T).square()
    return float((wrong if output_weight is None else wrong * output_weight).sum())


@pytest.mark.parametrize("spec", [A4, A4_ASYMMETRIC])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_range_has_the_least_output_error_of_all_tried(spec: QuantSpec, weighted: bool) -> None:
    x, weight = rows(), weights("q")["q"]
    values = fit_grid(weight, QuantSpec(bits=4)).nearest(weight)
    importance = torch.rand(64, 16) if weighted else None
    found = search_activation_range(x, weight, values, spec, importance)
    tried = list(input_ranges(x, spec))
    errors = [error(x, weight, values, limits, spec, importance) for limits in tried]
    assert error(x, weight, values, found, spec, importance) == pytest.approx(min(errors), rel=1e-5)
    spanned = (float(x.min()), float(x.max()))
    assert error(x, weight, values, found, spec, importance) < 0.8 * error(x, weight, values, spanned, spec, importance)
    assert len(tried) == 102


def test_a_range_gives_the_scale_that_was_scored() -> None:
    """Symmetric candidates are factors of absmax / (2^(b-1) - 1/2); the range stands for exactly that scale."""
    x = rows()
    scales = [
        float(choose_qparams(torch.tensor(low), torch.tensor(high), bits=4, symmetric=True).scale)
        for low, high in input_ranges(x, A4)
    ]
    assert scales[0] == pytest.approx(30 / 7) and scales[-1] == pytest.approx(1.2 * 30 / 7.5)
    assert scales[1] == pytest.approx(0.01 * 30 / 7.5)


def test_invariant_30_a_constant_weight_chooses_as_plain_squared_error_does() -> None:
    x, given = rows(), weights()
    plain = search_scales(x, given, W4, A4)
    for constant in (1.0, 3.7e-9):
        importance = {name: torch.full((64, 16), constant) for name in given}
        same = search_scales(x, given, W4, A4, importance)
        assert same.range == plain.range
        for name, weight in given.items():
            assert torch.equal(same.grids[name].nearest(weight), plain.grids[name].nearest(weight))


def test_the_weights_of_outputs_decide() -> None:
    """Where only the row with the spike counts, the range reaches it; where it does not count, the range is short."""
    x, given = rows(), weights("q")
    spike, rest = torch.zeros(64, 16), torch.ones(64, 16)
    spike[3], rest[3] = 1.0, 0.0
    long = search_scales(x, given, W4, A4, {"q": spike}).range
    short = search_scales(x, given, W4, A4, {"q": rest}).range
    assert long[1] > 20 > 10 > short[1]


def test_turns_are_never_worse_than_min_max_of_both() -> None:
    x, given = rows(), weights()
    found = search_scales(x, given, W4, A4)
    minmax = QuantSpec(bits=4, granularity="tensor")
    plain = {name: fit_grid(weight, minmax) for name, weight in given.items()}
    spanned = (float(x.min()), float(x.max()))

    def total(grids: SearchedScales | dict, limits: tuple[float, float]) -> float:
        return sum(error(x, weight, grids[name].nearest(weight), limits, A4) for name, weight in given.items())

    assert total(found.grids, found.range) < 0.7 * total(plain, spanned)


def test_linears_of_one_input_share_its_range() -> None:
    x, given = rows(), weights()
    found = search_scales(x, given, QuantSpec(bits=4), A4)
    assert set(found.grids) == set(given)
    stacked = torch.cat(list(given.values()))
    values = torch.cat([found.grids[name].nearest(given[name]) for name in given])
    assert found.range == search_activation_range(x, stacked, values, A4)


def test_a_side_that_is_not_searched_keeps_its_own_range() -> None:
    x, given = rows(), weights("q")
    found = search_scales(x, given, W4, QuantSpec(bits=4, granularity="tensor"))
    assert found.range == (float(x.min()), float(x.max()))
    short = search_scales(x, given, W4, QuantSpec(bits=4, granularity="tensor", range="percentile", percentile=99.0))
    assert short.range[1] < 10, "percentile ranges leave the spike out"
    assert search_scales(x, given, W4, QuantSpec(bits=4, granularity="tensor"), limits=(-9.0, 9.0)).range == (-9, 9)
    minmax = QuantSpec(bits=4, granularity="tensor")
    kept = search_scales(x, given, minmax, A4).grids["q"]
    assert torch.equal(kept.nearest(given["q"]), fit_grid(given["q"], minmax).nearest(given["q"]))


def test_a_twin_region_range_moves_its_upper_end_only() -> None:
    x, weight = torch.nn.functional.gelu(2 * rows()), weights("q")["q"]
    spec = QuantSpec(bits=4, grid="twin_region", granularity="tensor", range="output")
    values = fit_grid(weight, QuantSpec(bits=8)).nearest(weight)
    low, high = search_activation_range(x, weight, values, spec)
    assert low == pytest.approx(float(x.min())) and 0 < high < float(x.max())
    grid = sign_grid((low, high), 4)
    assert float(grid.levels()[0]) == pytest.approx(low) and float(grid.levels()[-1]) == pytest.approx(high)
    errors = [error(x, weight, values, limits, spec) for limits in input_ranges(x, spec)]
    assert error(x, weight, values, (low, high), spec) == pytest.approx(min(errors), rel=1e-5)
    symmetric = search_activation_range(x, weight, values, A4)
    assert min(errors) < error(x, weight, values, symmetric, A4), "the same steps above zero, finer ones below"


def test_zeros_are_finite_and_missing_rows_are_said() -> None:
    weight = weights("q")["q"]
    low, high = search_activation_range(torch.zeros(4, 24), weight, weight, A4)
    assert torch.isfinite(quantize_inputs(torch.zeros(4, 24), A4, (low, high))).all()
    for bad in (torch.zeros(0, 24), torch.full((2, 24), float("nan"))):
        with pytest.raises(CalibrationError, match="missing or not finite"):
            search_activation_range(bad, weight, weight, A4)
