"""Rank correlation."""

from __future__ import annotations

from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """The rank of every entry of `values` (n,), from 0, float64; equal entries share the mean of their ranks."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts + 1) / 2)[place]


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two vectors (n,), -1 to 1; 0 where one of them is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a.dot(b)) / size if size else 0.0
