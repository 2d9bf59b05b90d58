"""Greedy block rotations and the serpentine permutation of DuQuant (arXiv 2406.01721) and TR-DQ (arXiv 2503.06564)."""

from __future__ import annotations

import torch
from torch import Tensor

from trdq_core.errors import ShapeError
from trdq_core.numerics.hadamard import largest_block

LARGEST_BLOCK = 128
ROTATION_SHARE = 0.05  # two fp16 rotations may weigh at most this share of the FP32 weights that read the input
WORK_SHARE = 0.25  # and take at most this share of their multiply-adds
PEAK_ROWS = 1024  # only rows of large norm can reach the peak under a rotation; the greedy search looks at this many
PATIENCE = 48  # greedy steps without a smaller peak after which the search has ended in practice


def choose_block(channels: int, out_features: int, wanted: int | None, *, dense: bool, layer: str = "input") -> int:
    """The block size n of a rotation over `channels` inputs read by `out_features` outputs in all.

    The largest power of two up to 128 that divides the width. Two dense rotations are also kept so small that they stay
    within 5 % of the FP32 weights' bytes and a quarter of their work, else they would eat on narrow models what
    quantization saves.
    ShapeError if a wanted size does not divide the width, or none does.
    """
    if wanted is not None:
        if channels % wanted:
            raise ShapeError(
                f"{layer}: block={wanted} does not divide {channels} channels; "
                f"use a power of two up to {largest_block(channels, LARGEST_BLOCK)}."
            )
        return wanted
    block = largest_block(channels, LARGEST_BLOCK)
    if dense:
        bytes_allowed = ROTATION_SHARE * 4 * channels * out_features
        while block > 16 and (2 * 2 * block * block > bytes_allowed or 2 * block > WORK_SHARE * out_features):
            block //= 2
    if block < 2:
        raise ShapeError(f"{layer}: {channels} channels cannot be split into even blocks; leave rotations out for it.")
    return block


def base_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal (size, size) float64 whose first column is constant 1/sqrt(size), the rest random."""
    uniform = torch.full((size,), size**-0.5, dtype=torch.float64)
    difference = -uniform
    difference[0] += 1
    householder = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(difference, difference) / difference.dot(
        difference
    )
    random = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator)).Q
    return torch.cat([householder[:, :1], householder[:, 1:] @ random], 1)


def greedy_rotation(x: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """The rotation (size, size) float64 that greedily lowers the peak of x (tokens, channels).

    Each step swaps the column of the largest entry to the front of the base rotation, so that this column is spread evenly.
    The prefix of steps with the smallest peak-to-peak value is kept; no step at all is always a candidate.
    """
    base = base_rotation(size, generator)
    values = x.reshape(-1, size).float()
    if len(values) > PEAK_ROWS:
        values = values[values.square().sum(1).topk(PEAK_ROWS).indices]
    product = torch.eye(size, dtype=torch.float64)
    best, best_peak, since = product, float(values.max() - values.min()), 0
    for _ in range(steps):
        column = int(values.abs().amax(0).argmax())
        order = torch.arange(size)
        order[0], order[column] = column, 0
        step = base[order][:, order]
        values = values @ step.float()
        product = product @ step
        peak = float(values.max() - values.min())
        since += 1
        if peak < best_peak:
            best, best_peak, since = product, peak, 0
        elif since >= PATIENCE:
            break
    return best


def serpentine_permutation(score: Tensor, size: int) -> Tensor:
    """The gather index (channels,) int32 dealing channels to blocks of `size`, largest first, forth and back.

    Every block gets the same mix of large and small channels; within a block they stand in order of size.
    """
    channels = score.numel()
    if channels % size:
        raise ShapeError(f"serpentine permutation: block {size} does not divide {channels} channels.")
    blocks = channels // size
    rounds = score.argsort(descending=True, stable=True).reshape(size, blocks)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1).to(torch.int32)
