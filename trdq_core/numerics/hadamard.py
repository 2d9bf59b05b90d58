"""Walsh-Hadamard matrices and the block transform built from them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trdq_core.errors import ShapeError


@functools.lru_cache(maxsize=16)
def hadamard(size: int) -> Tensor:
    """The normalised Walsh-Hadamard matrix (size, size) float64: symmetric and its own inverse. Sylvester's construction."""
    if size < 1 or size & (size - 1):
        raise ShapeError(f"Hadamard size: got {size}; allowed are powers of two.")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotate_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., channels) with every block of n neighbouring channels multiplied by `matrix` (n, n): the same for all blocks."""
    size = matrix.shape[0]
    if x.shape[-1] % size:
        raise ShapeError(f"block rotation: {size} does not divide {x.shape[-1]} channels.")
    return (x.reshape(-1, size) @ matrix.to(x)).reshape(x.shape)


def largest_block(channels: int, limit: int) -> int:
    """The largest power of two that divides `channels` and is at most `limit`."""
    block = channels & -channels
    while block > limit:
        block //= 2
    return block
