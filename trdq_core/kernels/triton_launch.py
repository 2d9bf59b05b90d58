"""Launches of the Triton kernels with tensors; importing this imports triton. Shapes are checked by `triton_gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from trdq_core.kernels import triton_kernels as kernels
from trdq_core.kernels import triton_products as products
from trdq_core.kernels.capabilities import capability_of
from trdq_core.kernels.triton_configs import (
    Product,
    ProductConfig,
    RowConfig,
    largest_dense,
    product_configs,
    row_configs,
    token_bucket,
)
from trdq_core.kernels.triton_tuning import run_fastest
from trdq_core.kernels.types import CHUNK, InputStages, PackedWeight, QuantizedActivation, StaticGrid

INTERPRETED = not isinstance(products.int8_kernel, triton.JITFunction)
PLAIN_BLOCK = 1024

Mix = Literal["nothing", "hadamard", "dense", "matmul"]
_MIX: dict[Mix, int] = {
    "nothing": kernels.NOTHING.value,
    "hadamard": kernels.HADAMARD.value,
    "dense": kernels.DENSE.value,
}


class Prologue(NamedTuple):
    """What is done to the rows first: nothing, GELU (tanh), or a LayerNorm without weights and then x (1 + factor) + shift.

    shift and factor are (batch, in_features); the rows of one sample follow each other.
    """

    kind: Literal["plain", "gelu", "layer_norm"] = "plain"
    shift: Tensor | None = None
    factor: Tensor | None = None
    epsilon: float = 1e-6


PLAIN = Prologue()
_PROLOGUE = {"plain": kernels.PLAIN.value, "gelu": kernels.GELU.value, "layer_norm": kernels.LAYER_NORM.value}


class Pass(NamedTuple):
    """One walk over the channels: scale, then gather, then at most one mixing of blocks of `size` channels."""

    inverse_scale: Tensor | None
    permutation: Tensor | None
    mix: Mix
    size: int
    matrix: Tensor | None


def plan_passes(stages: InputStages, largest: int = 128) -> list[Pass]:
    """The online transform in as few passes as hold it; the last one can quantize too.

    Rotations wider than `largest` do not fit on the chip beside the tiles and go through a matmul of torch's.
    """
    scale, permutation = stages.inverse_scale, None
    passes: list[Pass] = []
    mixings = (
        (stages.rotation, 0, stages.permutation),  # the permutation comes after this one
        (None, stages.hadamard_block, None),
        (stages.second_rotation, 0, None),
    )
    for matrix, block, after in mixings:
        if matrix is not None and matrix.shape[0] > largest:
            if scale is not None or permutation is not None or not passes:
                passes.append(Pass(scale, permutation, "nothing", 0, None))
            passes.append(Pass(None, None, "matmul", matrix.shape[0], matrix.contiguous()))
            scale = permutation = None
        elif matrix is not None:
            passes.append(Pass(scale, permutation, "dense", matrix.shape[0], matrix.contiguous()))
            scale = permutation = None
        elif block:
            passes.append(Pass(scale, permutation, "hadamard", block, None))
            scale = permutation = None
        permutation = permutation if after is None else after
    if scale is not None or permutation is not None or not passes or passes[-1].mix == "matmul":
        passes.append(Pass(scale, permutation, "nothing", 0, None))
    return passes


def transform_rows(x: Tensor, stages: InputStages, dtype: torch.dtype) -> Tensor:
    """T(x), (tokens, in_features) in `dtype`, for x of the same shape."""
    passes = plan_passes(stages, largest_dense(capability_of(x.device)))
    return _run_passes(x, passes, PLAIN, dtype)[0]


def quantize_rows(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None,
    clip: float,
    prologue: Prologue = PLAIN,
) -> QuantizedActivation:
    """Signed levels of T(prologue(x)) for x of (tokens, in_features)."""
    *before, last = plan_passes(stages, largest_dense(capability_of(x.device)))
    batch = 1 if prologue.shift is None else prologue.shift.shape[0]
    tokens_each = max(x.shape[0] // batch, 1)
    x, prologue = _run_passes(x, before, prologue, torch.float32)
    tokens, width = x.shape
    result = QuantizedActivation(
        torch.empty((tokens, width), dtype=torch.int8, device=x.device),
        torch.empty(tokens, dtype=torch.float32, device=x.device),
        torch.empty(tokens, dtype=torch.float32, device=x.device),
        torch.empty(tokens, dtype=torch.int32, device=x.device),
    )
    grid = (None, None) if static is None else (static.scale.float(), static.zero_point.float())
    constants = {"STATIC": static is not None, "BITS": bits, "SYMMETRIC": symmetric}
    _launch_rows(
        kernels.quantize_kernel, x, last, prologue, tokens_each, (*grid, clip, *result, tokens, width), constants
    )
    return result


class Around(NamedTuple):
    """What a product is written into, and what is done to it on the way: y = added + gate * product.

    `y` (tokens, out_features) may be columns of a wider tensor, as `added` then is with the same strides; gate is (items,
    out_features), whose rows may be anywhere, and every item is tokens / items rows.
    """

    y: Tensor
    added: Tensor | None = None
    gate: Tensor | None = None


def product(activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None, around: Around) -> None:
    """The scaled product of signed levels and a weight in rows, written into `around.y` in its type."""
    values, x_scale, x_zero, x_sum = activation
    y, added, gate = around
    tokens, width = values.shape
    w_zero = None if weight.zero_point is None else weight.zero_point.float()
    levels = (values.contiguous(), x_scale, x_zero, x_sum, weight.data)
    items, gate_stride = (1, 0) if gate is None else (gate.shape[0], gate.stride(0))
    rest = (
        weight.scale.float(), w_zero, weight.column_sum.float(), bias, added, gate, gate_stride,
        max(tokens // items, 1), y, y.stride(0), tokens, weight.out_features, width,
    )  # fmt: skip
    common = {
        "HAS_W_ZERO": w_zero is not None,
        "HAS_BIAS": bias is not None,
        "HAS_ADDED": added is not None,
        "HAS_GATE": gate is not None,
    }
    if weight.bits == 8:
        _launch_product("int8", (*levels, *rest), common, y, width)
        return
    groups = None if weight.group_scale is None else weight.group_scale.to(torch.int8)
    count = 1 if groups is None else groups.shape[1]
    group_size = weight.group_size or width
    common |= {"GROUPS": groups is not None, "WIDE": group_size % (CHUNK // 2) == 0 or count == 1}
    _launch_product("int4", (*levels, groups, *rest, count, group_size), common, y, width)


def fp8_product(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The scaled product, (tokens, out_features) in `dtype`, of e4m3 rows of x and w."""
    y = torch.empty((x.shape[0], w.shape[0]), dtype=dtype, device=x.device)
    arguments = (x.contiguous(), x_scale, w.contiguous(), w_scale, bias, y, x.shape[0], w.shape[0], x.shape[1])
    _launch_product("fp8", arguments, {"HAS_BIAS": bias is not None}, y, x.shape[1])
    return y


def _run_passes(x: Tensor, passes: list[Pass], prologue: Prologue, dtype: torch.dtype) -> tuple[Tensor, Prologue]:
    """x after the passes, in `dtype` after the last one and float32 between them; the prologue is used up by the first."""
    batch = 1 if prologue.shift is None else prologue.shift.shape[0]
    for index, one in enumerate(passes):
        kind = dtype if index == len(passes) - 1 else torch.float32
        if one.mix == "matmul":
            assert one.matrix is not None  # planned with it
            x = (x.unflatten(1, (-1, one.size)) @ one.matrix).flatten(1).to(kind)
            continue
        y = torch.empty(x.shape, dtype=kind, device=x.device)
        tokens_each = max(x.shape[0] // batch, 1)
        _launch_rows(kernels.transform_kernel, x, one, prologue, tokens_each, (y, *x.shape), {})
        x, prologue = y, PLAIN
    return x, prologue


def _launch_rows(
    kernel: Callable[..., object],
    x: Tensor,
    one: Pass,
    prologue: Prologue,
    tokens_each: int,
    arguments: tuple[object, ...],
    constants: dict[str, object],
) -> None:
    """Launch `transform_kernel` or `quantize_kernel` for one pass; `arguments` are those after the prologue's."""
    if not x.shape[0]:
        return
    tokens, width = x.shape
    block = _block_of(one, width)
    shift, factor, epsilon = prologue.shift, prologue.factor, prologue.epsilon
    leading = (
        x, x.stride(0), one.inverse_scale, one.permutation, one.matrix, one.size or block,
        shift, factor, 0 if shift is None else shift.stride(0), tokens_each, epsilon,
    )  # fmt: skip
    constants = constants | {
        "PROLOGUE": _PROLOGUE[prologue.kind],
        "HAS_SCALE": one.inverse_scale is not None,
        "HAS_PERMUTATION": one.permutation is not None,
        "MIX": _MIX[one.mix],
        "BLOCK": block,
    }

    def launch(config: RowConfig) -> None:
        # Without fused multiply-adds the levels are those of the reference, bit for bit where nothing is mixed.
        kernel[(triton.cdiv(tokens, config.rows),)](
            *leading,
            *arguments,
            **constants,
            ROWS=config.rows,
            num_warps=config.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )

    key = (kernel.__name__, token_bucket(tokens), width, x.dtype, *constants.values(), x.device)
    with _current(x.device):
        run_fastest(key, row_configs(one.mix == "dense", tokens), launch, x.device)


def _block_of(one: Pass, width: int) -> int:
    """Channels of one tile: a power of two, as Triton wants."""
    if one.mix == "hadamard":
        return one.size
    if one.mix == "dense":
        return max(16, triton.next_power_of_2(one.size))
    return min(PLAIN_BLOCK, triton.next_power_of_2(max(width, 1)))


_PRODUCTS = {"int8": products.int8_kernel, "int4": products.int4_kernel, "fp8": products.fp8_kernel}


def _launch_product(
    name: Product, arguments: tuple[object, ...], constants: dict[str, object], y: Tensor, width: int
) -> None:
    tokens, outputs = y.shape
    if not y.numel():
        return
    kernel = _PRODUCTS[name]

    def launch(config: ProductConfig) -> None:
        tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(outputs, config.block_n)
        step = {} if name == "int4" else {"BLOCK_K": config.block_k}
        kernel[(tiles,)](
            *arguments, **constants, **step, EVEN=width % config.block_k == 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_M=config.group_m,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    key = (name, token_bucket(tokens), outputs, width, y.dtype, *constants.values(), y.device)
    with _current(y.device):
        run_fastest(key, product_configs(name, tokens, capability_of(y.device)), launch, y.device)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
