"""What the kernels pass around: quantized activations, the online transform, packed weights; and the checks on them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import ShapeError

HADAMARD_BLOCKS = (32, 64, 128, 256)
PANEL = 64  # columns of one weight panel; kPanel in csrc/common.h
CHUNK = 128  # channels of one chunk of nibbles where weights lie in rows; CHUNK in triton_products


class QuantizedActivation(NamedTuple):
    """Integer levels of (tokens, in_features) activations; real value = (values - zero_point) * scale.

    The GPU kernels give int8 instead of uint8, levels and zero point both 128 lower: matrix units there multiply signed
    bytes by signed bytes. The formula, and so the real value, is the same.
    """

    values: Tensor  # (tokens, in_features) uint8
    scale: Tensor  # (tokens,) float32
    zero_point: Tensor  # (tokens,) float32, integer-valued, in the uint8 domain (128 for symmetric)
    row_sum: Tensor  # (tokens,) int32, sum of values

    def rows(self, first: int) -> QuantizedActivation:
        """The tokens from `first` on; nothing is copied or quantized again."""
        return QuantizedActivation(*(part[first:] for part in self))


class StaticGrid(NamedTuple):
    """One calibrated grid for every token: a scale and a zero point of one element each, float32."""

    scale: Tensor
    zero_point: Tensor  # in the uint8 domain (128 for symmetric)


class InputStages(NamedTuple):
    """The online transform T(x) = second_rotation(hadamard(permute(rotation(x * inverse_scale)))); any part may be absent.

    A rotation is one (n, n) matrix R applied to every block of n channels as x_block @ R. The permutation gathers:
    y[j] = x[permutation[j]]. The Hadamard transform is normalised (orthogonal), in blocks of 32, 64, 128 or 256.
    """

    inverse_scale: Tensor | None = None  # (in_features,) float32
    rotation: Tensor | None = None  # (n, n) float32
    permutation: Tensor | None = None  # (in_features,) int32
    hadamard_block: int = 0
    second_rotation: Tensor | None = None  # (n, n) float32

    @property
    def empty(self) -> bool:
        """True where T is the identity."""
        parts = (self.inverse_scale, self.rotation, self.permutation, self.second_rotation)
        return not self.hadamard_block and all(part is None for part in parts)


NO_STAGES = InputStages()


class Prologue(NamedTuple):
    """What is done to rows (tokens, channels) before the transform: "gelu" (tanh approximation), or "norm".

    "norm" is layer norm without weights, then (1 + scale) * that + shift; scale and shift are (items, channels) float32, and
    every item is tokens / items rows.
    """

    kind: Literal["gelu", "norm"]
    shift: Tensor | None = None
    scale: Tensor | None = None
    epsilon: float = 0.0


class Epilogue(NamedTuple):
    """What is done to a product (tokens, channels): `added + gate * product`, gate (items, channels) or None for 1."""

    added: Tensor  # (tokens, channels) float32
    gate: Tensor | None = None


class PackedWeight(NamedTuple):
    """A weight of (out_features, in_features) integers in panels of 64 columns, or in rows for the GPU kernels.

    Real value = (integer * group_scale - zero_point) * scale, where group_scale is 1 if absent.
    data, 8 bits: int8  (panels, ceil(in/4), 64, 4)
          4 bits: uint8 (panels, ceil(in/8), 64, 4); low nibble = channels 8j..8j+3, high = 8j+4..8j+7, value + 8
    In rows, as `packing.to_rows` makes them: int8 (out, in), or uint8 (out, ceil(in/128) * 64).
    All tensors are contiguous, so a set of weights can be stacked along a new first axis and indexed without a copy.
    """

    data: Tensor
    scale: Tensor  # (out_features,) float32
    zero_point: Tensor | None  # (out_features,) float32, integer-valued
    column_sum: Tensor  # (out_features,) float32: sum over in_features of integer * group_scale
    group_scale: Tensor | None  # (out_features, in_features / group_size) int8, 1..16; 4 bits only
    bits: int  # storage: 8 or 4
    group_size: int  # 0 without group_scale
    in_features: int
    out_features: int


def check_bits(bits: int) -> None:
    """Raises ShapeError unless activations of `bits` fit the 8-bit product."""
    if not 2 <= bits <= 8:
        raise ShapeError(f"activation bits={bits} cannot run; use 2 to 8.")


def check_input(x: Tensor, stages: InputStages) -> None:
    """Raises ShapeError where x, (..., in_features), cannot pass through the stages."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(f"the input is {x.dtype} of shape {tuple(x.shape)}; give floats of shape (..., in_features).")
    width = x.shape[-1]
    inverse_scale, rotation, permutation, block, second_rotation = stages
    if inverse_scale is not None:
        _check_vector("inverse_scale", inverse_scale, width, torch.float32)
    if permutation is not None:
        _check_vector("permutation", permutation, width, torch.int32)
    if rotation is not None:
        _check_rotation("rotation", rotation, width)
    if second_rotation is not None:
        _check_rotation("second_rotation", second_rotation, width)
    if block and (block not in HADAMARD_BLOCKS or width % block):
        allowed = [size for size in HADAMARD_BLOCKS if width % size == 0]
        raise ShapeError(f"hadamard_block={block} does not fit {width} channels; use 0 or one of {allowed}.")


def check_prologue(x: Tensor, prologue: Prologue | None) -> None:
    """Raises ShapeError where rows x (tokens, channels) do not go with the shift and scale of a prologue."""
    if prologue is None or prologue.kind == "gelu":
        return
    shift, scale = prologue.shift, prologue.scale
    for name, part in (("shift", shift), ("scale", scale)):
        if part is None or part.dim() != 2 or part.shape[1] != x.shape[1] or not _items_fit(x, part):
            found = "nothing" if part is None else str(tuple(part.shape))
            raise ShapeError(
                f"the norm's {name} is {found}; {x.shape[0]} tokens of {x.shape[1]} channels need "
                f"(items, {x.shape[1]}) with a number of items that divides the tokens."
            )
    assert shift is not None and scale is not None  # seen above
    if shift.shape != scale.shape:
        raise ShapeError(
            f"the norm has shift {tuple(shift.shape)} and scale {tuple(scale.shape)}; give both for the same items."
        )


def check_epilogue(tokens: int, out_features: int, epilogue: Epilogue | None) -> None:
    """Raises ShapeError where a product (tokens, out_features) does not go with what is added to it or with its gate."""
    if epilogue is None:
        return
    added, gate = epilogue
    if added.shape != (tokens, out_features):
        raise ShapeError(f"a residual of shape {tuple(added.shape)} cannot be added to ({tokens}, {out_features}).")
    if gate is not None and (gate.dim() != 2 or gate.shape[1] != out_features or not _items_fit(added, gate)):
        raise ShapeError(f"a gate of shape {tuple(gate.shape)} does not go with ({tokens}, {out_features}).")


def check_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> None:
    """Raises ShapeError where q (items, rows, channels), k, v (items, keys, channels) and mask do not belong together."""
    fits = q.dim() == 3 and k.shape == v.shape and k.dim() == 3 and heads > 0 and q.shape[2] % heads == 0
    if not fits or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or k.shape[1] == 0:
        shapes = ", ".join(str(tuple(part.shape)) for part in (q, k, v))
        raise ShapeError(f"attention of {heads} heads: queries, keys and values of {shapes} do not belong together.")
    sizes = (q.shape[0], heads, q.shape[1], k.shape[1])
    if mask is not None and not (mask.is_floating_point() or mask.dtype is torch.bool):
        raise ShapeError(
            f"the attention mask is {mask.dtype}; give floats that are added to the scores, or bool where True takes part."
        )
    if mask is not None and (
        mask.dim() != 4
        or mask.shape[3] != sizes[3]
        or any(given not in (1, size) for given, size in zip(mask.shape[:3], sizes, strict=False))
    ):
        raise ShapeError(f"an attention mask of {tuple(mask.shape)} does not go with scores of {sizes}.")


def _items_fit(rows: Tensor, part: Tensor) -> bool:
    return part.shape[0] > 0 and rows.shape[0] % part.shape[0] == 0


def _check_vector(name: str, vector: Tensor, width: int, dtype: torch.dtype) -> None:
    if vector.dtype is not dtype or vector.shape != (width,):
        raise ShapeError(f"{name} is {vector.dtype} {tuple(vector.shape)}; {width} channels need {dtype} ({width},).")


def _check_rotation(name: str, matrix: Tensor, width: int) -> None:
    size = matrix.shape[0] if matrix.dim() == 2 else 0
    if matrix.dtype is not torch.float32 or size == 0 or matrix.shape[1] != size or width % size:
        raise ShapeError(
            f"{name} is {matrix.dtype} {tuple(matrix.shape)}; {width} channels need a square float32 matrix "
            f"whose size divides {width}."
        )


def check_product(values: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    """Raises ShapeError where levels or inputs, (tokens, in_features), weight and bias do not belong together."""
    if values.shape[-1] != weight.in_features:
        raise ShapeError(
            f"the input has {values.shape[-1]} channels but the weight takes in_features={weight.in_features}."
        )
    if bias is not None and bias.shape != (weight.out_features,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)} but the weight gives out_features={weight.out_features}.")
    sizes = (weight.bits, weight.in_features, weight.out_features)
    if weight.data.shape not in (packed_shape(*sizes), row_shape(*sizes)):
        raise ShapeError(
            f"packed data has shape {tuple(weight.data.shape)}; {weight.bits} bits, in_features={weight.in_features} "
            f"and out_features={weight.out_features} need one set of "
            f"{packed_shape(weight.bits, weight.in_features, weight.out_features)}."
        )


def packed_shape(bits: int, in_features: int, out_features: int) -> tuple[int, int, int, int]:
    """Shape of `PackedWeight.data`: bytes of 8 bits hold 4 channels per lane, nibbles of 4 bits hold 8."""
    return (-(-out_features // PANEL), -(-in_features // (32 // bits)), PANEL, 4)


def row_shape(bits: int, in_features: int, out_features: int) -> tuple[int, int]:
    """Shape of `PackedWeight.data` in rows: a byte a channel for 8 bits, half a byte in chunks of 128 for 4."""
    return (out_features, in_features if bits == 8 else -(-in_features // CHUNK) * (CHUNK // 2))
