"""Channel scales that move ranges between activations and weights: SmoothQuant's formula, and the search for its alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from trdq_core.transforms.base import InputTransform

FLOOR = 1e-5  # channel ranges below it count as this, so that a dead channel keeps a finite scale
ALPHAS = tuple(i / 20 for i in range(1, 20))


def smooth_scale(activation_absmax: Tensor, weight_absmax: Tensor | None, alpha: float) -> Tensor:
    """d (channels,) float64 = a^alpha / w^(1 - alpha): what activations are divided by (SmoothQuant, arXiv 2211.10438).

    Without `weight_absmax` it is a^alpha alone, the second form that SVDQuant (arXiv 2411.05007) tries.
    """
    a = activation_absmax.double().clamp_min(FLOOR).pow(alpha)
    return a if weight_absmax is None else a / weight_absmax.double().clamp_min(FLOOR).pow(1 - alpha)


def candidate_scales(activation_absmax: Tensor, weight_absmax: Tensor) -> Iterator[Tensor | None]:
    """No scale, then both forms at every alpha = i / 20: the 39 candidates of SVDQuant."""
    yield None
    for alpha in ALPHAS:
        yield smooth_scale(activation_absmax, weight_absmax, alpha)
        yield smooth_scale(activation_absmax, None, alpha)


def search_scale(
    activation_absmax: Tensor,
    weight_absmax: Tensor,
    complete: Callable[[Tensor | None], InputTransform],
    output_error: Callable[[InputTransform], float],
) -> Tensor | None:
    """The candidate scale d (channels,) whose transform has the least `output_error`; None where no scale is best.

    `complete` makes the transform that a candidate is judged in: its best scale depends on the rotation behind it, because a
    rotation spreads outliers as well and leaves smoothing less to do.
    """
    best, least = None, float("inf")
    for scale in candidate_scales(activation_absmax, weight_absmax):
        error = output_error(complete(scale))
        if error < least:  # not a number never wins
            best, least = scale, error
    return best
