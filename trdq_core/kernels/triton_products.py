"""The Triton matrix products: int8 by int8, int8 by packed int4, and fp8, all with scales and bias in the epilogue.

Importing this imports triton, so nothing on the CPU's way may. Weights lie in rows (see `packing`): a row of channels for
each output, so that both operands of a product run along the channels in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(128)  # channels of one packed chunk: low nibbles are its first half; CHUNK in packing
HALF = tl.constexpr(64)


@triton.jit
def _tile(tokens, outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Rows and columns of this program; neighbours share weights, so that these stay in the L2 cache."""
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    first = program // (GROUP_M * across) * GROUP_M
    rows = min(down - first, GROUP_M)
    inside = program % (GROUP_M * across)
    row = (first + inside % rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = inside // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, column


@triton.jit
def _finish(
    total, row, column, tokens, outputs, width, x_scale, x_zero, x_sum, w_scale, w_zero, w_sum, bias, added, gate,
    gate_stride, tokens_each, y, y_stride, HAS_W_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Zero points in exact int32, then scales, bias, gate and residual in float32. Sums fit up to 33,000 channels."""
    row_ok, column_ok = row < tokens, column < outputs
    zero = tl.load(x_zero + row, mask=row_ok, other=0.0).to(tl.int32)
    total -= zero[:, None] * tl.load(w_sum + column, mask=column_ok, other=0.0).to(tl.int32)[None, :]
    if HAS_W_ZERO:
        centred = tl.load(x_sum + row, mask=row_ok, other=0) - width * zero
        total -= centred[:, None] * tl.load(w_zero + column, mask=column_ok, other=0.0).to(tl.int32)[None, :]
    result = total.to(tl.float32) * tl.load(x_scale + row, mask=row_ok, other=0.0)[:, None]
    result *= tl.load(w_scale + column, mask=column_ok, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * y_stride + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    if HAS_GATE:
        item = (row // tokens_each).to(tl.int64) * gate_stride
        result *= tl.load(gate + item[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32)
    if HAS_ADDED:  # lies as y does
        result += tl.load(added + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=ok)


@triton.jit
def int8_kernel(
    x: tl.tensor, x_scale: tl.tensor, x_zero: tl.tensor, x_sum: tl.tensor, w: tl.tensor, w_scale: tl.tensor,
    w_zero: tl.tensor, w_sum: tl.tensor, bias: tl.tensor, added: tl.tensor, gate: tl.tensor, gate_stride: tl.tensor,
    tokens_each: tl.tensor, y: tl.tensor, y_stride: tl.tensor, tokens: tl.tensor, outputs: tl.tensor,
    width: tl.tensor, HAS_W_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    HAS_GATE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:  # fmt: skip
    """int8 levels by int8 weights; EVEN says that BLOCK_K divides the width. What is added has the strides of y."""
    row, column = _tile(tokens, outputs, BLOCK_M, BLOCK_N, GROUP_M)
    channel = tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[:, None] * width + channel[None, :]
    w_at = w + column.to(tl.int64)[None, :] * width + channel[:, None]
    row_ok, column_ok = (row < tokens)[:, None], (column < outputs)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            a = tl.load(x_at + start, mask=row_ok, other=0)
            b = tl.load(w_at + start, mask=column_ok, other=0)
        else:
            a = tl.load(x_at + start, mask=row_ok & (start + channel < width)[None, :], other=0)
            b = tl.load(w_at + start, mask=column_ok & (start + channel < width)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    _finish(
        total, row, column, tokens, outputs, width, x_scale, x_zero, x_sum, w_scale, w_zero, w_sum, bias, added, gate,
        gate_stride, tokens_each, y, y_stride, HAS_W_ZERO, HAS_BIAS, HAS_ADDED, HAS_GATE,
    )  # fmt: skip


@triton.jit
def _scaled_half(
    nibbles, group_scale, column, column_ok, start, groups, group_size,
    OFFSET: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Weights of 64 channels from start + OFFSET on times their integer group scales; -128..112, so int8 holds them."""
    if GROUPS:
        if WIDE:  # the half lies inside one group
            group = (start + OFFSET) // group_size
            scale = tl.load(group_scale + column * groups + group, mask=column_ok & (group < groups), other=0)[None, :]
        else:
            group = (start + OFFSET + tl.arange(0, HALF)) // group_size
            at = column[None, :] * groups + group[:, None]
            scale = tl.load(group_scale + at, mask=column_ok[None, :] & (group < groups)[:, None], other=0)
        nibbles = nibbles * scale
    return nibbles


@triton.jit
def int4_kernel(
    x: tl.tensor, x_scale: tl.tensor, x_zero: tl.tensor, x_sum: tl.tensor, w: tl.tensor, group_scale: tl.tensor,
    w_scale: tl.tensor, w_zero: tl.tensor, w_sum: tl.tensor, bias: tl.tensor, added: tl.tensor, gate: tl.tensor,
    gate_stride: tl.tensor, tokens_each: tl.tensor, y: tl.tensor, y_stride: tl.tensor, tokens: tl.tensor,
    outputs: tl.tensor, width: tl.tensor, groups: tl.tensor, group_size: tl.tensor, HAS_W_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_GATE: tl.constexpr, EVEN: tl.constexpr,
    GROUPS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
) -> None:  # fmt: skip
    """int8 levels by packed nibbles, unpacked in registers; one chunk of 128 channels a step, its halves in two products.

    EVEN says that 128 divides the width, WIDE that each half chunk has one group scale.
    """
    row, column = _tile(tokens, outputs, BLOCK_M, BLOCK_N, GROUP_M)
    row_ok, column_ok = row < tokens, column < outputs
    half = tl.arange(0, HALF)
    packed_width = tl.cdiv(width, CHUNK) * HALF
    x_at = x + row.to(tl.int64)[:, None] * width + half[None, :]
    w_at = w + column.to(tl.int64)[None, :] * packed_width + half[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, width, CHUNK):
        packed = tl.load(w_at + start // 2, mask=column_ok[None, :], other=0).to(tl.int8, bitcast=True)
        low = (packed << 4) >> 4  # shifting an int8 right keeps its sign
        high = packed >> 4
        low = _scaled_half(low, group_scale, column, column_ok, start, groups, group_size, 0, GROUPS, WIDE)
        high = _scaled_half(high, group_scale, column, column_ok, start, groups, group_size, 64, GROUPS, WIDE)
        if EVEN:
            first = tl.load(x_at + start, mask=row_ok[:, None], other=0)
            second = tl.load(x_at + start + HALF, mask=row_ok[:, None], other=0)
        else:
            inside = (start + half < width)[None, :]
            first = tl.load(x_at + start, mask=row_ok[:, None] & inside, other=0)
            inside = (start + half + HALF < width)[None, :]
            second = tl.load(x_at + start + HALF, mask=row_ok[:, None] & inside, other=0)
        total = tl.dot(first, low, total, out_dtype=tl.int32)
        total = tl.dot(second, high, total, out_dtype=tl.int32)
    _finish(
        total, row, column, tokens, outputs, width, x_scale, x_zero, x_sum, w_scale, w_zero, w_sum, bias, added, gate,
        gate_stride, tokens_each, y, y_stride, HAS_W_ZERO, HAS_BIAS, HAS_ADDED, HAS_GATE,
    )  # fmt: skip


@triton.jit
def fp8_kernel(
    x: tl.tensor, x_scale: tl.tensor, w: tl.tensor, w_scale: tl.tensor, bias: tl.tensor, y: tl.tensor,
    tokens: tl.tensor, outputs: tl.tensor, width: tl.tensor, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
) -> None:  # fmt: skip
    """e4m3 by e4m3, summed in float32; a scale for each token and one for each output."""
    row, column = _tile(tokens, outputs, BLOCK_M, BLOCK_N, GROUP_M)
    channel = tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[:, None] * width + channel[None, :]
    w_at = w + column.to(tl.int64)[None, :] * width + channel[:, None]
    row_ok, column_ok = row < tokens, column < outputs
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            a = tl.load(x_at + start, mask=row_ok[:, None], other=0.0)
            b = tl.load(w_at + start, mask=column_ok[None, :], other=0.0)
        else:
            inside = start + channel < width
            a = tl.load(x_at + start, mask=row_ok[:, None] & inside[None, :], other=0.0)
            b = tl.load(w_at + start, mask=column_ok[None, :] & inside[:, None], other=0.0)
        # Hopper sums e4m3 products with 14 bits; what one step adds goes into a float32 sum of its own.
        total = tl.dot(a, b, total, max_num_imprecise_acc=BLOCK_K)
    result = total * tl.load(x_scale + row, mask=row_ok, other=0.0)[:, None]
    result *= tl.load(w_scale + column, mask=column_ok, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
