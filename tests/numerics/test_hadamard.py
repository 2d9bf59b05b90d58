"""Invariant 1: rotations are orthogonal."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import ShapeError
from trdq_core.numerics.hadamard import hadamard, largest_block, rotate_blocks


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_001_hadamard_is_orthogonal_symmetric_and_made_of_one_magnitude(size: int) -> None:
    matrix = hadamard(size)
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() <= 1e-12
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_only_powers_of_two() -> None:
    with pytest.raises(ShapeError, match="12; allowed are powers of two"):
        hadamard(12)


def test_blocks_are_rotated_apart() -> None:
    x = torch.zeros(1, 8, dtype=torch.float64)
    x[0, 5] = 1
    rotated = rotate_blocks(x, hadamard(4))
    assert rotated[0, :4].abs().max() == 0
    assert torch.allclose(rotated[0, 4:].abs(), torch.full((4,), 0.5, dtype=torch.float64))


def test_009_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ShapeError, match="64 does not divide 96"):
        rotate_blocks(torch.zeros(1, 96), hadamard(64))


@pytest.mark.parametrize(
    ("channels", "limit", "block"), [(1152, 128, 128), (2240, 128, 64), (384, 128, 128), (7, 128, 1)]
)
def test_largest_block(channels: int, limit: int, block: int) -> None:
    assert largest_block(channels, limit) == block
