"""The twin-log quantizer by the formula of LRQ-DiT (arXiv 2508.03485): uniform in the logarithm, each sign on its own.

    q = round(log2(|w| + eta) / s) on a uniform grid between two logarithms,  |w| ~ 2^(level) - eta

It exists to measure the paper's construction against `twin_log`, which recipes use. `clean` takes range and percentiles over
the weights of one sign and eta relative to the row's absmax. `released` repeats what the published code does: an absolute
eta, entries of the other sign counted as log2(1) = 0, and one level more than the bits allow.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from trdq_core.numerics.affine import TINY

ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
PERCENTILES = (98.0, 99.0, 99.9, 99.99, 99.999)


def twin_log_clean(x: Tensor, bits: int) -> Tensor:
    """x (rows, n) rounded with eta (relative to each row's absmax) and percentiles of the least squared error, per row.

    2^(bits-1) - 1 positive and as many negative levels, and zero.
    """
    x = x.double()
    absmax = x.abs().amax(1, keepdim=True).clamp_min(TINY)
    best, best_error = torch.zeros_like(x), x.square().sum(1, keepdim=True)
    for eta, percentile in itertools.product(ETAS, PERCENTILES):
        parts = [_half(sign * x, eta * absmax, percentile, bits) * sign for sign in (1, -1)]
        rounded = parts[0] + parts[1]
        error = (rounded - x).square().sum(1, keepdim=True)
        best = torch.where(error < best_error, rounded, best)
        best_error = torch.minimum(error, best_error)
    return best


def twin_log_released(x: Tensor, bits: int) -> Tensor:
    """x (rows, n) as the published code rounds it: eta absolute and, like the percentiles, chosen for the whole tensor."""
    x = x.double()
    best, best_error = torch.zeros_like(x), float("inf")
    for eta, percentile in itertools.product((0.0, *ETAS), PERCENTILES):
        parts = [_released_half(sign * x, eta, percentile, 2 ** (bits - 1) - (sign > 0)) * sign for sign in (1, -1)]
        rounded = parts[0] + parts[1]
        error = float((rounded - x).square().sum())
        if error < best_error:
            best, best_error = rounded, error
    return best


def _half(x: Tensor, eta: Tensor, percentile: float, bits: int) -> Tensor:
    """The values of x (rows, n) above zero on logarithmic levels from near zero to their percentile, others zero."""
    inside = x > 0
    magnitude = x.clamp_min(0)
    counts = inside.sum(1, keepdim=True)
    # Sorted with the other sign at the front, so a percentile over the mask is an index from the end.
    rank = x.shape[1] - counts + (counts * percentile / 100).ceil().long().clamp_min(1) - 1
    top = magnitude.sort(1).values.gather(1, rank.clamp(max=x.shape[1] - 1)).clamp_min(TINY)
    low, high = torch.log2(eta), torch.log2(top + eta)
    last = 2 ** (bits - 1) - 1
    step = (high - low) / last
    index = ((torch.log2(magnitude + eta) - low) / step).round().clamp(0, last)
    # The lowest level is zero itself: the difference of two equal numbers would leave rounding noise there.
    return torch.where(inside & (index > 0), torch.exp2(low + index * step) - eta, 0.0)


def _released_half(x: Tensor, eta: float, percentile: float, last: int) -> Tensor:
    """One sign as released: entries outside the mask stay 0 in the logarithm and are part of range and percentile."""
    inside = x > 0
    logs = torch.where(inside, torch.log2(x.clamp_min(TINY) + eta), 0.0)
    low = logs.amin(1, keepdim=True)
    rank = min(x.shape[1], max(1, round(percentile / 100 * x.shape[1])))
    high = logs.kthvalue(rank, 1, keepdim=True).values
    step = ((high - low) / last).clamp_min(TINY)
    index = ((logs - low) / step).round().clamp(0, last)
    return torch.where(inside, torch.exp2(low + index * step) - eta, 0.0)
