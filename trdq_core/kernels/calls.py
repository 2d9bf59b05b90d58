"""The C++ library's entry points, called with tensors; shapes are checked by the callers in `cpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.errors import ShapeError
from trdq_core.kernels.structures import Attention, Heads, Residual, Rows, Weight
from trdq_core.kernels.types import Epilogue, InputStages, PackedWeight, Prologue, QuantizedActivation, StaticGrid

_STATUS = {1: "the C++ kernels refused the call", 2: "the C++ kernels could not get memory"}
_PROLOGUES = {"gelu": 1, "norm": 2}
Biased = tuple[PackedWeight, Tensor | None]


def transform_rows(library: ctypes.CDLL, x: Tensor, stages: InputStages, prologue: Prologue | None = None) -> Tensor:
    """T(x), (tokens, in_features) float32, for x of the same shape."""
    x, stages, prologue = _plain(x, torch.float32), _plain_stages(stages), _plain_prologue(prologue)
    y = torch.empty_like(x)
    rows = _rows(x, stages, prologue)
    status = library.trdq_transform(byref(rows), y.data_ptr(), torch.get_num_threads())
    if status:
        _refuse_stages(status, stages, x.shape[1])
    return y


def quantize_rows(
    library: ctypes.CDLL,
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None,
    clip: float = 1.0,
    prologue: Prologue | None = None,
) -> QuantizedActivation:
    """Levels of T(x) for x of (tokens, in_features)."""
    x, stages, prologue = _plain(x, torch.float32), _plain_stages(stages), _plain_prologue(prologue)
    tokens, width = x.shape
    values = torch.empty((tokens, width), dtype=torch.uint8)
    scale = torch.empty(tokens, dtype=torch.float32)
    zero_point = torch.empty(tokens, dtype=torch.float32)
    row_sum = torch.empty(tokens, dtype=torch.int32)
    grid = _plain_grid(static)
    rows = _rows(x, stages, prologue, bits, symmetric, grid, clip)
    status = library.trdq_quantize(
        byref(rows),
        values.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        row_sum.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        _refuse_stages(status, stages, width)
    return QuantizedActivation(values, scale, zero_point, row_sum)


def product(library: ctypes.CDLL, activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """The scaled product, (tokens, out_features) float32; the sizes must be ones that the panels can take."""
    values, a_scale, a_zero, a_sum = activation
    values = _plain(values, torch.uint8)
    if values.shape[1] % 4:
        values = functional.pad(values, (0, -values.shape[1] % 4))
    a_scale, a_zero = _plain(a_scale, torch.float32), _plain(a_zero, torch.float32)
    a_sum = _plain(a_sum, torch.int32)
    weight, bias = _plain_weight(weight), _maybe_plain(bias, torch.float32)
    tokens = values.shape[0]
    y = torch.empty((tokens, weight.out_features), dtype=torch.float32)
    packed = Weight(*_weight_fields(weight, bias), y.data_ptr(), weight.out_features)
    status = library.trdq_linear(
        values.data_ptr(),
        a_scale.data_ptr(),
        a_zero.data_ptr(),
        a_sum.data_ptr(),
        tokens,
        byref(packed),
        torch.get_num_threads(),
    )
    if status:
        raise RuntimeError(f"{_STATUS[status]} of {tokens} tokens with {tuple(weight.data.shape)} weights.")
    return y


def linears_from_float(
    library: ctypes.CDLL,
    x: Tensor,
    stages: InputStages,
    weights: Sequence[Biased],
    bits: int,
    symmetric: bool,
    static: StaticGrid | None,
    clip: float = 1.0,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """(tokens, all out_features) float32 for x of (tokens, in_features): the products with weights that read the same
    rows side by side, quantized once. No levels are allocated. An epilogue has the columns of all products.
    """
    x, stages, prologue = _plain(x, torch.float32), _plain_stages(stages), _plain_prologue(prologue)
    plain = [(_plain_weight(weight), _maybe_plain(bias, torch.float32)) for weight, bias in weights]
    columns = sum(weight.out_features for weight, _ in plain)
    y = torch.empty((x.shape[0], columns), dtype=torch.float32)
    packed, at = (Weight * len(plain))(), y.data_ptr()
    for index, (weight, bias) in enumerate(plain):
        packed[index] = Weight(*_weight_fields(weight, bias), at, columns)
        at += 4 * weight.out_features
    grid = _plain_grid(static)
    rows = _rows(x, stages, prologue, bits, symmetric, grid, clip)
    epilogue = _plain_epilogue(epilogue)
    residual = None if epilogue is None else byref(_residual(epilogue))
    status = library.trdq_linears_from_float(byref(rows), packed, len(plain), residual, torch.get_num_threads())
    if status:
        _refuse_stages(status, stages, x.shape[1])
    return y


def attend(
    library: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, bits: int = 0
) -> Tensor:
    """softmax(q k^T / sqrt(width) + mask) v: (items, rows, heads * width) float32.

    q is (items, rows, heads * width) float32, k and v (items, keys, heads * width); only their last dimension has to be
    contiguous. The mask is (items or 1, heads or 1, rows or 1, keys). bits 8 takes int8 products, 0 float32.
    """
    q, k, v = (_last_contiguous(part) for part in (q, k, v))
    items, rows, channels = q.shape
    y = torch.empty((items, rows, channels), dtype=torch.float32)
    keys, width = k.shape[1], channels // heads
    mask = None if mask is None else _last_contiguous(mask)
    strides = [0, 0, 0]
    if mask is not None:
        strides = [0 if size == 1 else mask.stride(axis) for axis, size in enumerate(mask.shape[:3])]
    places = [Heads(part.data_ptr(), part.stride(0), part.stride(1)) for part in (q, k, v, y)]
    sizes = (items, heads, rows, keys, width)
    call = Attention(*places, *sizes, _pointer(mask), *strides, width**-0.5, bits)
    status = library.trdq_attend(byref(call), torch.get_num_threads())
    if status:
        raise RuntimeError(
            f"{_STATUS[status]} of attention with {rows} rows, {keys} keys and {heads} x {width} channels."
        )
    return y


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _last_contiguous(tensor: Tensor) -> Tensor:
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _maybe_plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _plain(tensor, dtype)


def _plain_stages(stages: InputStages) -> InputStages:
    inverse_scale, rotation, permutation, block, second_rotation = stages
    if inverse_scale is rotation is permutation is second_rotation is None:
        return stages
    return InputStages(
        _maybe_plain(inverse_scale, torch.float32),
        _maybe_plain(rotation, torch.float32),
        _maybe_plain(permutation, torch.int32),
        block,
        _maybe_plain(second_rotation, torch.float32),
    )


def _plain_prologue(prologue: Prologue | None) -> Prologue | None:
    if prologue is None or prologue.shift is None:
        return prologue
    shift, scale = _plain(prologue.shift, torch.float32), _maybe_plain(prologue.scale, torch.float32)
    return prologue._replace(shift=shift, scale=scale)


def _plain_epilogue(epilogue: Epilogue | None) -> Epilogue | None:
    if epilogue is None:
        return None
    return Epilogue(_plain(epilogue.added, torch.float32), _maybe_plain(epilogue.gate, torch.float32))


def _plain_grid(static: StaticGrid | None) -> StaticGrid | None:
    return None if static is None else StaticGrid(static.scale.float(), static.zero_point.float())


def _plain_weight(weight: PackedWeight) -> PackedWeight:
    """The same weight with tensors that the library can read; a module cast with .half() casts its scales too."""
    data, scale, zero_point, column_sum, group_scale, *sizes = weight
    parts = (
        data if data.is_contiguous() else data.contiguous(),
        _plain(scale, torch.float32),
        _maybe_plain(zero_point, torch.float32),
        _plain(column_sum, torch.float32),
        _maybe_plain(group_scale, torch.int8),
    )
    same = all(part is own for part, own in zip(parts, weight, strict=False))
    return weight if same else PackedWeight(*parts, *sizes)


def _weight_fields(weight: PackedWeight, bias: Tensor | None) -> tuple[int | None, ...]:
    return (
        weight.in_features,
        weight.out_features,
        weight.data.data_ptr(),
        weight.bits,
        _pointer(weight.group_scale),
        weight.group_size,
        weight.scale.data_ptr(),
        _pointer(weight.zero_point),
        weight.column_sum.data_ptr(),
        _pointer(bias),
    )


def _rows(
    x: Tensor,
    stages: InputStages,
    prologue: Prologue | None,
    bits: int = 8,
    symmetric: bool = True,
    grid: StaticGrid | None = None,
    clip: float = 1.0,
) -> Rows:
    """What the library reads; the caller keeps the tensors alive."""
    inverse_scale, first, permutation, block, second = stages
    kind, epsilon, shift, factor, item_rows = 0, 0.0, None, None, 1
    if prologue is not None:
        kind, epsilon, shift, factor = _PROLOGUES[prologue.kind], prologue.epsilon, prologue.shift, prologue.scale
        item_rows = 1 if shift is None else max(1, x.shape[0] // shift.shape[0])
    return Rows(
        x.data_ptr(),
        *x.shape,
        *(kind, epsilon, _pointer(shift), _pointer(factor), item_rows),
        _pointer(inverse_scale),
        *(_pointer(first), 0 if first is None else first.shape[0]),
        _pointer(permutation),
        block,
        *(_pointer(second), 0 if second is None else second.shape[0]),
        bits,
        symmetric,
        *((None, None) if grid is None else (grid.scale.data_ptr(), grid.zero_point.data_ptr())),
        clip,
    )


def _residual(epilogue: Epilogue) -> Residual:
    added, gate = epilogue
    rows, columns = added.shape
    items = 1 if gate is None else gate.shape[0]
    return Residual(added.data_ptr(), columns, _pointer(gate), columns, max(1, rows // items))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _refuse_stages(status: int, stages: InputStages, width: int) -> None:
    """Raises for a failed call. The shapes were checked before, so a refusal means an index outside the row."""
    if status == 1 and stages.permutation is not None:
        low, high = int(stages.permutation.min()), int(stages.permutation.max())
        raise ShapeError(f"permutation holds {low}..{high}; {width} channels need indices 0..{width - 1}.")
    raise RuntimeError(f"{_STATUS[status]}.")
