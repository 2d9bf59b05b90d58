"""Ranges of uniform grids, and static ranges of activations (invariant 19)."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import CalibrationError
from trdq_core.numerics.ranges import averaged_range, minmax_range, percentile_range, searched_range, static_range


def rows() -> torch.Tensor:
    return torch.randn(64, 100, generator=torch.Generator().manual_seed(0))


def error(x: torch.Tensor, ends: tuple[float, float], bits: int, symmetric: bool) -> float:
    from trdq_core.numerics.affine import choose_qparams, fake_quantize

    qparams = choose_qparams(torch.tensor(ends[0]), torch.tensor(ends[1]), bits=bits, symmetric=symmetric)
    return float((fake_quantize(x, qparams, bits=bits) - x).square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", (3, 4, 8))
def test_invariant_19_a_searched_static_range_is_never_worse_than_min_max(bits: int, symmetric: bool) -> None:
    x = rows()
    x[3, 7] = 20
    grid = {"bits": bits, "symmetric": symmetric}
    searched, plain = (static_range(x, **grid, range=r) for r in ("mse", "minmax"))
    assert error(x, searched, **grid) <= error(x, plain, **grid) * (1 + 1e-5)
    assert plain == (float(x.min()), 20.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_invariant_19_no_row_loses_by_a_searched_range(symmetric: bool) -> None:
    x = rows().double()
    start = minmax_range(x)
    found = searched_range(x, start, bits=3, symmetric=symmetric)
    assert ((found.low >= start.low) & (found.high <= start.high)).all()
    assert (found.high < start.high).any()


def test_a_percentile_leaves_out_the_largest_values() -> None:
    x = torch.arange(-500.0, 500.0)[None]
    assert percentile_range(x, 99.0, symmetric=False) == (-490.0, 489.0)
    assert percentile_range(x, 100.0, symmetric=False) == (-500.0, 499.0)
    low, high = percentile_range(x, 99.0, symmetric=True)
    assert float((x.abs() <= high).double().mean()) == pytest.approx(0.99, abs=0.002)
    assert low == -high
    assert percentile_range(x[:, :1], 50.0, symmetric=True) == (-500.0, 500.0)


def test_averaged_ranges_begin_with_the_first_item() -> None:
    items = torch.tensor([[-1.0, 2.0], [-3.0, 4.0]])
    found = averaged_range(items, 0.75)
    assert (float(found.low), float(found.high)) == (-1.5, 2.5)
    assert static_range(rows(), bits=8, symmetric=False, range="ema", momentum=0.75, item_ranges=items) == (-1.5, 2.5)
    with pytest.raises(CalibrationError, match=r'range "ema": got item ranges of shape \(2,\)'):
        averaged_range(torch.zeros(2), 0.5)


def test_without_items_each_row_is_one() -> None:
    x = rows()
    low, high = static_range(x, bits=8, symmetric=False, range="ema", momentum=0.0)
    assert (low, high) == (float(x[-1].min()), float(x[-1].max()))


def test_clip_multiplies_the_range() -> None:
    x = rows()
    low, high = static_range(x, bits=8, symmetric=True, clip=0.5)
    assert (low, high) == pytest.approx((float(x.min()) / 2, float(x.max()) / 2))


def test_no_rows_are_one_sentence() -> None:
    with pytest.raises(CalibrationError, match="activation: no rows were observed"):
        static_range(torch.zeros(0, 8), bits=8, symmetric=True)
