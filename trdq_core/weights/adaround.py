"""The relaxation of AdaRound (arXiv 2004.10568): between which two levels a weight lies, and a learnable share of the way.

    soft weight = below + h(V) * (above - below),  h(V) = clip((zeta - gamma) * sigmoid(V) + gamma, 0, 1)

V is what is learned; the penalty drives every h to 0 or 1, and hardening takes the nearer end. Pure functions over a
WeightGrid: the loss and the loop are trdq_core.reconstruction's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.weights.grids import WeightGrid

GAMMA, ZETA = -0.1, 1.1  # the sigmoid is stretched past both ends, so that 0 and 1 are reached at finite V


class Neighbours(NamedTuple):
    """The levels a weight may be rounded to, (out, in) each, and where it lies between them, 0 to 1."""

    below: Tensor
    above: Tensor
    fraction: Tensor


def find_neighbours(weight: Tensor, grid: WeightGrid) -> Neighbours:
    """The grid values next to each weight (out, in) float64; a weight on the grid or beyond its end has one level only."""
    weight = weight.detach().double()
    below, above = grid.neighbours(weight)
    gap = above - below
    inside = gap > 0
    fraction = torch.where(inside, (weight - below) / torch.where(inside, gap, 1.0), 0.0)
    return Neighbours(below, above, fraction.clamp(0, 1))


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V): 0 to 1, both ends included."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def initial_logits(fraction: Tensor) -> Tensor:
    """V with h(V) = fraction, so that learning starts at the full-precision weight."""
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


def soft_weight(neighbours: Neighbours, v: Tensor) -> Tensor:
    """The weight (out, in) as V has it, differentiable in V, in V's dtype."""
    below, above = neighbours.below.to(v.dtype), neighbours.above.to(v.dtype)
    return below + rectified_sigmoid(v) * (above - below)


def rounding_penalty(v: Tensor, beta: float | Tensor) -> Tensor:
    """sum of 1 - |2 h(V) - 1|^beta, a scalar: zero where every weight has decided. Large beta leaves undecided ones alone."""
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def harden(neighbours: Neighbours, v: Tensor) -> Tensor:
    """Grid values (out, in) float64: above where h(V) >= 1/2, else below. `WeightGrid.encode` takes them."""
    return torch.where(rectified_sigmoid(v) >= 0.5, neighbours.above, neighbours.below)
