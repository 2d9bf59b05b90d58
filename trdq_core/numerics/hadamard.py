"""Hadamard matrices and the block transform built from them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trdq_core.errors import ShapeError


@functools.lru_cache(maxsize=16)
def hadamard(size: int) -> Tensor:
    """A normalised Hadamard matrix (size, size) float64: orthogonal, every entry +-1/sqrt(size).

    Powers of two are Sylvester's and so symmetric. Other sizes are K * 2^m with K from Paley's constructions, which covers
    the widths of most transformers: 1152 = 36 * 32, 1536 = 12 * 128, 5120 = 20 * 256. ShapeError where neither reaches,
    92 or 156 for instance. The kernels run blocks of 32, 64, 128 and 256 only: QuaRot's full-width Hadamard is therefore
    the block transform there, which mixes fewer channels and costs fewer operations.
    """
    matrix = _odd_part(size)
    if matrix is None:
        raise ShapeError(
            f"Hadamard size: got {size}; allowed are powers of two, and K * 2^m with K = 12, 20, 28, 36 and other Paley sizes."
        )
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


def _odd_part(size: int) -> Tensor | None:
    """The +-1 matrix that doubling makes to `size`: (1, 1), or the smallest Paley matrix on the way; None if there is none."""
    if size < 1:
        return None
    if not size & (size - 1):
        return torch.ones(1, 1, dtype=torch.float64)
    start = size
    while start % 8 == 0:
        start //= 2
    while start <= size:
        matrix = _paley(start)
        if matrix is not None:
            return matrix
        start *= 2
    return None


def _paley(size: int) -> Tensor | None:
    """A +-1 matrix H (size, size) with H H^T = size, or None where Paley's constructions over GF(p) and GF(p^2) give none.

    First: q = size - 1 = 3 mod 4, H = I + S with S skew. Second: q = size / 2 - 1 = 1 mod 4, from a symmetric conference
    matrix. S borders the Jacobsthal matrix, the quadratic character of all differences in GF(q).
    """
    if size % 4:
        return None
    jacobsthal = _jacobsthal(size - 1)
    if jacobsthal is not None:
        return _bordered(jacobsthal, corner=-1.0) + torch.eye(size, dtype=torch.float64)
    jacobsthal = _jacobsthal(size // 2 - 1)
    if jacobsthal is None or (size // 2 - 1) % 4 != 1:
        return None
    conference, identity = _bordered(jacobsthal, corner=1.0), torch.eye(size // 2, dtype=torch.float64)
    on, off = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(conference, on) + torch.kron(identity, off)


def _bordered(jacobsthal: Tensor, *, corner: float) -> Tensor:
    """[[0, 1], [corner, Q]]: a row of ones above and a column of `corner` beside the Jacobsthal matrix."""
    size = jacobsthal.shape[0] + 1
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, corner, jacobsthal
    return matrix


def _jacobsthal(q: int) -> Tensor | None:
    """The quadratic character of a - b for all a, b of GF(q), (q, q), where q is an odd prime or the square of one."""
    root = round(q**0.5)
    if _is_odd_prime(q):
        character = _characters(q)
        element = torch.arange(q)
        return character[(element[:, None] - element[None]) % q]
    if root * root != q or not _is_odd_prime(root):
        return None
    character = _characters(root)
    nonresidue = int((character < 0).nonzero()[0, 0])
    # a + b sqrt(r) is a square in GF(p^2) exactly where its norm a^2 - r b^2 is one in GF(p).
    first, second = torch.arange(q) // root, torch.arange(q) % root
    a, b = first[:, None] - first[None], second[:, None] - second[None]
    return character[(a * a - nonresidue * b * b) % root]


def _characters(p: int) -> Tensor:
    """0 for zero, 1 for the squares and -1 for all others of GF(p), (p,) float64."""
    character = -torch.ones(p, dtype=torch.float64)
    character[torch.arange(p) ** 2 % p] = 1
    character[0] = 0
    return character


def _is_odd_prime(number: int) -> bool:
    return number > 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
