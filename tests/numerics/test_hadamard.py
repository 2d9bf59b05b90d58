"""Hadamard matrices of all sizes that the constructions reach, and the block transform."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import ShapeError
from trdq_core.numerics.hadamard import hadamard, largest_block, rotate_blocks


def assert_hadamard(matrix: torch.Tensor) -> None:
    size = matrix.shape[0]
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() <= 1e-12
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_invariant_01_powers_of_two_are_orthogonal_and_symmetric(size: int) -> None:
    matrix = hadamard(size)
    assert_hadamard(matrix)
    assert torch.equal(matrix, matrix.T)


# First construction 12, 20, 60, 108, 140; second 28, 36, 148; over the square of a prime 52, 100; doubled: the rest,
# which are widths of transformers or parts of them.
@pytest.mark.parametrize("size", [12, 20, 24, 28, 36, 40, 52, 60, 72, 100, 108, 140, 144, 148, 288, 384, 640, 1152])
def test_invariant_01_other_sizes_are_orthogonal(size: int) -> None:
    assert_hadamard(hadamard(size))


@pytest.mark.parametrize("size", [-4, 0, 3, 6, 18, 92, 156, 172])
def test_sizes_out_of_reach_are_refused(size: int) -> None:
    with pytest.raises(ShapeError, match=rf"Hadamard size: got {size}; allowed are powers of two, and K \* 2\^m"):
        hadamard(size)


def test_blocks_are_rotated_apart() -> None:
    x = torch.zeros(1, 8, dtype=torch.float64)
    x[0, 5] = 1
    rotated = rotate_blocks(x, hadamard(4))
    assert rotated[0, :4].abs().max() == 0
    assert torch.allclose(rotated[0, 4:].abs(), torch.full((4,), 0.5, dtype=torch.float64))


def test_invariant_09_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ShapeError, match="64 does not divide 96"):
        rotate_blocks(torch.zeros(1, 96), hadamard(64))


@pytest.mark.parametrize(
    ("channels", "limit", "block"), [(1152, 128, 128), (2240, 128, 64), (384, 128, 128), (7, 128, 1)]
)
def test_largest_block(channels: int, limit: int, block: int) -> None:
    assert largest_block(channels, limit) == block
