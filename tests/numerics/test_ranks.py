"""Spearman's correlation against its definition."""

from __future__ import annotations

import pytest
import torch

from trdq_core.numerics.ranks import ranks, spearman


def test_equal_entries_share_their_mean_rank() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_only_the_order_counts() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert float(spearman(x, x.exp())) == pytest.approx(1)
    assert float(spearman(x, -(x**3))) == pytest.approx(-1)


def test_the_textbook_formula_without_ties() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randperm(20, generator=generator), torch.randperm(20, generator=generator)
    expected = 1 - 6 * float((a - b).square().sum()) / (20 * (20**2 - 1))
    assert float(spearman(a, b)) == pytest.approx(expected)


def test_a_constant_correlates_with_nothing() -> None:
    assert float(spearman(torch.ones(5), torch.arange(5))) == 0
    assert float(spearman(torch.arange(5), torch.ones(5))) == 0


def test_rows_are_ranked_each_by_itself() -> None:
    rows, other = torch.randn(7, 30, generator=torch.Generator().manual_seed(2)).round(decimals=1), torch.arange(30.0)
    together = spearman(rows, other)
    assert together.shape == (7,)
    assert together.tolist() == pytest.approx([float(spearman(row, other)) for row in rows])
