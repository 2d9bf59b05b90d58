"""Searched scales: a hundred candidates around the one that spans the tensor, kept by a score (PTQ4ViT, TQ-DiT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trdq_core.numerics.affine import TINY
from trdq_core.numerics.twin_region import SCALES

ROUNDS = 3  # of alternating between the two operands of a product


def scale_candidates(absmax: Tensor, bits: int) -> Iterator[Tensor]:
    """Scales of a symmetric grid, each in the shape of `absmax`: the one that spans it, then SCALES times absmax/(2^(b-1)-1/2).

    The first makes a searched scale never worse than min-max.
    """
    absmax = absmax.clamp_min(TINY)
    yield absmax / (2 ** (bits - 1) - 1)
    for factor in SCALES:
        yield factor * absmax / (2 ** (bits - 1) - 0.5)


def search_scale(absmax: Tensor, bits: int, error: Callable[[Tensor], Tensor]) -> Tensor:
    """For each entry of `absmax` the candidate with the least `error(scale)`, which has the shape of `absmax`.

    Entries must not depend on each other: those of one head, for instance, only on the scale of that head.
    """
    best = least = None
    for scale in scale_candidates(absmax, bits):
        found = error(scale)
        if best is None or least is None:
            best, least = scale, found
            continue
        best = torch.where(found < least, scale, best)
        least = torch.minimum(found, least)
    assert best is not None  # there are always candidates
    return best
