"""Tile sizes that the Triton kernels are tuned over, and which of them a chip and a shape can use; plain numbers."""

from __future__ import annotations

from typing import Literal, NamedTuple

Product = Literal["int8", "int4", "fp8"]


class ProductConfig(NamedTuple):
    """Tile of one program of a matrix product, and how it is pipelined."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int


class RowConfig(NamedTuple):
    """Tokens that one program of a quantization owns, and its warps."""

    rows: int
    warps: int


# The first of each list is what runs where nothing can be timed: while a CUDA graph is recorded, and in the interpreter.
PRODUCT_CONFIGS: dict[Product, tuple[ProductConfig, ...]] = {
    "int8": (
        ProductConfig(128, 64, 128, 8, 4, 3),
        ProductConfig(128, 128, 128, 8, 8, 3),
        ProductConfig(128, 256, 128, 8, 8, 3),
        ProductConfig(64, 128, 128, 8, 4, 3),
        ProductConfig(64, 64, 128, 8, 4, 4),
        ProductConfig(32, 64, 128, 8, 4, 4),
        ProductConfig(16, 64, 256, 8, 4, 3),
    ),
    "int4": (
        ProductConfig(128, 64, 128, 8, 4, 3),
        ProductConfig(128, 128, 128, 8, 8, 3),
        ProductConfig(64, 128, 128, 8, 4, 3),
        ProductConfig(64, 64, 128, 8, 4, 4),
        ProductConfig(32, 64, 128, 8, 4, 4),
        ProductConfig(16, 64, 128, 8, 4, 4),
    ),
    "fp8": (  # Hopper multiplies fewer than 64 rows in its fp16 units, which would be no fp8 product
        ProductConfig(128, 64, 128, 8, 4, 3),
        ProductConfig(128, 128, 128, 8, 8, 3),
        ProductConfig(64, 64, 128, 8, 4, 4),
    ),
}
ROW_CONFIGS = (RowConfig(8, 4), RowConfig(4, 4), RowConfig(2, 2), RowConfig(16, 8))
DENSE_CONFIGS = (RowConfig(16, 8), RowConfig(32, 8))  # matrix products take 16 rows at least

# Shared memory that one program may ask for, in bytes, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications); others take the smallest.
SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
SMALLEST_SHARED_BYTES = 101_376


def shared_bytes(product: Product, config: ProductConfig) -> int:
    """Bytes that the operand tiles of all pipeline stages take; packed nibbles count half, and once unpacked."""
    m, n, k = config.block_m, config.block_n, config.block_k
    if product == "int4":
        return (m * k + n * k // 2) * config.stages + n * k
    return (m + n) * k * config.stages


def product_configs(product: Product, tokens: int, capability: tuple[int, int] | None) -> tuple[ProductConfig, ...]:
    """The configurations to try for so many tokens on a chip: those that fit its shared memory and waste few rows.

    Never empty; without a capability (in the interpreter) only the first.
    """
    if capability is None:
        return PRODUCT_CONFIGS[product][:1]
    limit = SHARED_BYTES.get(capability[0] * 10 + capability[1], SMALLEST_SHARED_BYTES)
    fitting = [config for config in PRODUCT_CONFIGS[product] if shared_bytes(product, config) <= limit]
    smallest = min(config.block_m for config in fitting)
    return tuple(config for config in fitting if config.block_m <= max(2 * tokens, smallest))


def row_configs(dense: bool, tokens: int) -> tuple[RowConfig, ...]:
    """The configurations to try for a pass over rows, with a dense rotation in it or not; a few tokens are not worth it."""
    configs = DENSE_CONFIGS if dense else ROW_CONFIGS
    return configs if tokens > 64 else configs[:1]


def largest_dense(capability: tuple[int, int] | None) -> int:
    """The widest rotation that a kernel holds on the chip: 128, or 64 where shared memory is small.

    Measured from the compiled kernels: the matrix lies there twice, as two TF32 terms, and the tile of 16 or 32 rows once.
    """
    if capability is None:
        return 128
    limit = SHARED_BYTES.get(capability[0] * 10 + capability[1], SMALLEST_SHARED_BYTES)
    rows = max(config.rows for config in DENSE_CONFIGS)
    return next(size for size in (128, 64) if (2 * size * size + rows * size) * 4 <= limit)


def token_bucket(tokens: int) -> int:
    """The power of two from `tokens` up: shapes that share one tuned configuration."""
    return 1 << max(tokens - 1, 0).bit_length()
