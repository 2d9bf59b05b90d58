"""Channel scales that move ranges between activations and weights: SmoothQuant's formula, and the search for its alpha."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

FLOOR = 1e-5  # channel ranges below it count as this, so that a dead channel keeps a finite scale
ALPHAS = tuple(i / 20 for i in range(1, 20))


def smooth_scale(activation_absmax: Tensor, weight_absmax: Tensor | None, alpha: float) -> Tensor:
    """d (channels,) float64 = a^alpha / w^(1 - alpha): what activations are divided by (SmoothQuant, arXiv 2211.10438).

    Without `weight_absmax` it is a^alpha alone, the second form that SVDQuant (arXiv 2411.05007) tries.
    """
    a = activation_absmax.double().clamp_min(FLOOR).pow(alpha)
    return a if weight_absmax is None else a / weight_absmax.double().clamp_min(FLOOR).pow(1 - alpha)


class Smoothing(NamedTuple):
    """How a scale comes from ranges: SmoothQuant's formula, or its numerator alone; no scale where `alpha` is None."""

    alpha: float | None
    with_weights: bool = True

    def scale(self, activation_absmax: Tensor, weight_absmax: Tensor) -> Tensor | None:
        """d (channels,) float64 of these ranges, (channels,) each."""
        if self.alpha is None:
            return None
        return smooth_scale(activation_absmax, weight_absmax if self.with_weights else None, self.alpha)


# No scale, then both forms at every alpha: the 39 candidates of SVDQuant.
CANDIDATES = (
    Smoothing(None),
    *(Smoothing(alpha, with_weights) for alpha in ALPHAS for with_weights in (True, False)),
)


def search_smoothing(error: Callable[[Smoothing], float]) -> Smoothing:
    """The candidate with the least `error`; what is not a number never wins.

    The error should be that of the complete transform: the best scale depends on the rotation behind it, because a rotation
    spreads outliers as well and leaves smoothing less to do.
    """
    best, least = CANDIDATES[0], float("inf")
    for candidate in CANDIDATES:
        found = error(candidate)
        if found < least:
            best, least = candidate, found
    return best
