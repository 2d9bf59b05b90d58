"""Rank correlation."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """The rank of every entry of `values` (..., n) along the last axis, from 0, float64; equal entries share their mean."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + upto - 1).double() / 2


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of vectors (..., n) with `second` (n,), float64 (...), -1 to 1; 0 where one is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean()
    size = a.norm(dim=-1) * b.norm()
    return torch.where(size > 0, (a @ b) / size.where(size > 0, 1), 0)
