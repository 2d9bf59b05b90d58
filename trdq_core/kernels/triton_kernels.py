"""The Triton kernels over activations: gather, scale, GELU or modulated LayerNorm, block rotation, quantization per token.

Importing this imports triton, so nothing on the CPU's way may. One program owns `ROWS` tokens and walks their channels
block by block: once for the range, once more (from the cache) to write the levels. The Hadamard transform is butterflies
in float32, so that the interpreter and every chip compute the same; a dense rotation goes through the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What is done to the input before anything else, and how channels of one block are mixed; constants of the kernels.
PLAIN, GELU, LAYER_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NOTHING, HADAMARD, DENSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SMALLEST_RANGE = tl.constexpr(1e-12)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds half to even below 2^22
TWO_ROOT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def _round(x):
    return (x + ROUNDER) - ROUNDER


@triton.jit
def _gelu(x):
    # x (1 + tanh u) / 2 is x times the logistic function of 2u.
    u = TWO_ROOT_TWO_OVER_PI * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-u))


@triton.jit
def _row_statistics(x, row_at, row_ok, width, epsilon, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and reciprocal standard deviation of each row; two passes, because the squares would cancel in one."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, CHUNK):
        column = start + tl.arange(0, CHUNK)
        ok = row_ok[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(x + row_at[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32), 1)
    mean = total / width
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, CHUNK):
        column = start + tl.arange(0, CHUNK)
        ok = row_ok[:, None] & (column < width)[None, :]
        value = tl.load(x + row_at[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32)
        centred = tl.where(ok, value - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    return mean, 1.0 / tl.sqrt(squares / width + epsilon)


@triton.jit
def _values(
    x, row_at, row_ok, column, column_ok, width, inverse_scale, permutation, shift, factor, modulation_at, mean, rstd,
    PROLOGUE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PERMUTATION: tl.constexpr,
):  # fmt: skip
    """float32 tile of the input after prologue, scale and gather; zero where nothing is."""
    if HAS_PERMUTATION:
        column = tl.load(permutation + column, mask=column_ok, other=0)
        column_ok = column_ok & (column >= 0) & (column < width)  # a wrong index reads zeros, never foreign memory
    ok = row_ok[:, None] & column_ok[None, :]
    value = tl.load(x + row_at[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32)
    if PROLOGUE == GELU:
        value = _gelu(value)
    if PROLOGUE == LAYER_NORM:
        at = modulation_at[:, None] + column[None, :]
        grown = 1.0 + tl.load(factor + at, mask=ok, other=0.0).to(tl.float32)
        moved = tl.load(shift + at, mask=ok, other=0.0).to(tl.float32)
        value = tl.where(ok, (value - mean[:, None]) * rstd[:, None] * grown + moved, 0.0)
    if HAS_SCALE:
        value = value * tl.load(inverse_scale + column, mask=column_ok, other=0.0)[None, :]
    return value


@triton.jit
def _matrix(matrix, size, MIX: tl.constexpr, BLOCK: tl.constexpr):
    """The dense rotation padded with zeros to (BLOCK, BLOCK); it stays on the chip for all blocks of the program."""
    if MIX == DENSE:
        row = tl.arange(0, BLOCK)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        loaded = tl.load(matrix + row * size + column, mask=(row < size) & (column < size), other=0.0)
    else:
        loaded = tl.zeros((1, 1), tl.float32)
    return loaded


@triton.jit
def _butterfly(value, ROWS: tl.constexpr, BLOCK: tl.constexpr, APART: tl.constexpr):
    """Sums and differences of channels that lie APART from each other."""
    pairs = tl.permute(tl.reshape(value, (ROWS, BLOCK // (2 * APART), 2, APART)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    mixed = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    return tl.reshape(mixed, (ROWS, BLOCK))


@triton.jit
def _mixed(value, loaded, MIX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's channels mixed: log2(BLOCK) butterflies in float32, or a product in three TF32 terms, as precise."""
    if MIX == HADAMARD:
        for level in tl.static_range(8):
            if (1 << level) < BLOCK:
                value = _butterfly(value, ROWS, BLOCK, 1 << level)
        value = value * (1.0 / BLOCK**0.5)
    if MIX == DENSE:
        value = tl.dot(value, loaded, input_precision="tf32x3")
    return value


@triton.jit
def _grid(low, high, clip, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and zero point (in the uint8 domain) of a token's range, as the reference computes them."""
    if SYMMETRIC:
        HALF: tl.constexpr = 2 ** (BITS - 1) - 1
        absmax = tl.maximum(-low, high)
        scale = tl.div_rn(tl.maximum(absmax * clip, SMALLEST_RANGE), tl.full(absmax.shape, HALF, tl.float32))
        zero = tl.full(absmax.shape, 128.0, tl.float32)
    else:
        LEVELS: tl.constexpr = 2**BITS - 1
        low, high = low * clip, high * clip
        scale = tl.div_rn(tl.maximum(high - low, SMALLEST_RANGE), tl.full(low.shape, LEVELS, tl.float32))
        zero = tl.minimum(tl.maximum(_round(tl.div_rn(-low, scale)), 0.0), LEVELS * 1.0)
    return scale, zero


@triton.jit
def quantize_kernel(
    x: tl.tensor, x_stride: tl.tensor, inverse_scale: tl.tensor, permutation: tl.tensor, matrix: tl.tensor,
    size: tl.tensor, shift: tl.tensor, factor: tl.tensor, modulation_stride: tl.tensor, tokens_each: tl.tensor,
    epsilon: tl.tensor, static_scale: tl.tensor, static_zero: tl.tensor, clip: tl.tensor, values: tl.tensor,
    scales: tl.tensor, zero_points: tl.tensor, row_sums: tl.tensor, tokens: tl.tensor, width: tl.tensor,
    PROLOGUE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PERMUTATION: tl.constexpr, MIX: tl.constexpr,
    STATIC: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Levels minus 128 (int8), scale, zero point minus 128 and sum of the levels of each token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < tokens
    row_at = row.to(tl.int64) * x_stride
    modulation_at = (row // tokens_each).to(tl.int64) * modulation_stride
    mean = tl.zeros((ROWS,), tl.float32)
    rstd = mean
    if PROLOGUE == LAYER_NORM:
        mean, rstd = _row_statistics(x, row_at, row_ok, width, epsilon, ROWS, 256)
    loaded = _matrix(matrix, size, MIX, BLOCK)
    offset = tl.arange(0, BLOCK)
    if STATIC:
        scale = tl.zeros((ROWS,), tl.float32) + tl.load(static_scale)
        zero = tl.zeros((ROWS,), tl.float32) + tl.minimum(tl.maximum(tl.load(static_zero), 0.0), 255.0)
    else:
        low = tl.zeros((ROWS,), tl.float32)
        high = tl.zeros((ROWS,), tl.float32)
        for start in range(0, width, size):
            column_ok = (offset < size) & (start + offset < width)
            value = _values(
                x, row_at, row_ok, start + offset, column_ok, width, inverse_scale, permutation, shift, factor,
                modulation_at, mean, rstd, PROLOGUE, HAS_SCALE, HAS_PERMUTATION,
            )  # fmt: skip
            value = _mixed(value, loaded, MIX, ROWS, BLOCK)
            low = tl.minimum(low, tl.min(value, 1))
            high = tl.maximum(high, tl.max(value, 1))
        scale, zero = _grid(low, high, clip, BITS, SYMMETRIC)
    lowest = (128 - (2 ** (BITS - 1) - 1) if SYMMETRIC else 0) - zero
    highest = (128 + (2 ** (BITS - 1) - 1) if SYMMETRIC else 2**BITS - 1) - zero
    total = tl.zeros((ROWS,), tl.int32)
    for start in range(0, width, size):
        column_ok = (offset < size) & (start + offset < width)
        value = _values(
            x, row_at, row_ok, start + offset, column_ok, width, inverse_scale, permutation, shift, factor,
            modulation_at, mean, rstd, PROLOGUE, HAS_SCALE, HAS_PERMUTATION,
        )  # fmt: skip
        value = _mixed(value, loaded, MIX, ROWS, BLOCK)
        ok = row_ok[:, None] & column_ok[None, :]
        level = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
        # Clipping to whole numbers before rounding gives the same levels, and what is rounded stays small.
        level = _round(tl.minimum(tl.maximum(level, lowest[:, None]), highest[:, None])) + (zero[:, None] - 128.0)
        level = tl.where(level == level, level, -128.0).to(tl.int32)  # NaN ends at the lowest byte
        total += tl.sum(tl.where(ok, level, 0), 1)
        at = row.to(tl.int64)[:, None] * width + (start + offset)[None, :]
        tl.store(values + at, level.to(tl.int8), mask=ok)
    tl.store(scales + row, scale, mask=row_ok)
    tl.store(zero_points + row, zero - 128.0, mask=row_ok)
    tl.store(row_sums + row, total, mask=row_ok)


@triton.jit
def transform_kernel(
    x: tl.tensor, x_stride: tl.tensor, inverse_scale: tl.tensor, permutation: tl.tensor, matrix: tl.tensor,
    size: tl.tensor, shift: tl.tensor, factor: tl.tensor, modulation_stride: tl.tensor, tokens_each: tl.tensor,
    epsilon: tl.tensor, y: tl.tensor, tokens: tl.tensor, width: tl.tensor, PROLOGUE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_PERMUTATION: tl.constexpr, MIX: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One pass of the online transform, prologue first, written in the type of `y`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < tokens
    row_at = row.to(tl.int64) * x_stride
    modulation_at = (row // tokens_each).to(tl.int64) * modulation_stride
    mean = tl.zeros((ROWS,), tl.float32)
    rstd = mean
    if PROLOGUE == LAYER_NORM:
        mean, rstd = _row_statistics(x, row_at, row_ok, width, epsilon, ROWS, 256)
    loaded = _matrix(matrix, size, MIX, BLOCK)
    offset = tl.arange(0, BLOCK)
    for start in range(0, width, size):
        column_ok = (offset < size) & (start + offset < width)
        value = _values(
            x, row_at, row_ok, start + offset, column_ok, width, inverse_scale, permutation, shift, factor,
            modulation_at, mean, rstd, PROLOGUE, HAS_SCALE, HAS_PERMUTATION,
        )  # fmt: skip
        value = _mixed(value, loaded, MIX, ROWS, BLOCK)
        at = row.to(tl.int64)[:, None] * width + (start + offset)[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
