"""Moving an input transform into the layer before, so that nothing of it is left to do at run time. All in float64.

What a linear reads is written by something, and some of it can take T over: the rows of an adaLN modulation, the rows of V,
a linear producer, or, for a permutation alone, a linear behind an elementwise activation. The reader's weight becomes
`transform.apply_to_weight(weight)` in every case. What cannot fold: rotations through a modulation or through GELU, and any
rotation of the residual stream, since modulation and gates are diagonal in the basis of the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trdq_core.errors import ShapeError
from trdq_core.transforms.base import InputTransform


def fold_into_modulation(scale: Tensor, shift: Tensor, inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Modulation (..., channels) whose output x (1 + scale) + shift comes out multiplied with `inverse_scale` (channels,).

    scale' = (1 + scale) / d - 1 and shift' = shift / d with d = 1 / inverse_scale (SmoothQuant on a DiT). For a table of a
    modulation that depends on the timestep alone, of one time group for instance.
    """
    inverse = inverse_scale.double()
    return (1 + scale.double()) * inverse - 1, shift.double() * inverse


def fold_into_modulation_rows(
    weight: Tensor, bias: Tensor | None, inverse_scale: Tensor, *, scale_rows: slice, shift_rows: slice
) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of an adaLN linear of one block, with the same fold done in its rows.

    `scale_rows` and `shift_rows` are where it writes the scale and the shift of the modulation in question: the second and
    the first of six equal parts for the attention of a DiT block, the fifth and fourth for its MLP.
    ShapeError if they do not hold as many rows as `inverse_scale` has channels.
    """
    weight, bias = weight.double().clone(), _bias(weight, bias)
    for name, rows in (("scale_rows", scale_rows), ("shift_rows", shift_rows)):
        if (held := len(bias[rows])) != len(inverse_scale):
            raise ShapeError(
                f"{name}: hold {held} rows for {len(inverse_scale)} channels; give one row for each channel."
            )
    inverse = inverse_scale.double()
    bias[scale_rows], bias[shift_rows] = fold_into_modulation(bias[scale_rows], bias[shift_rows], inverse)
    for rows in (scale_rows, shift_rows):
        weight[rows] = weight[rows] * inverse[:, None]
    return weight, bias


def fold_into_linear(weight: Tensor, bias: Tensor | None, transform: InputTransform) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a linear that writes T(y) in place of y.

    For a producer that the transformed linears alone read, the caption projection before cross-attention for instance.
    """
    return transform.apply(weight.double().T).T.contiguous(), transform.apply(_bias(weight, bias))


def fold_into_values(
    weight: Tensor, bias: Tensor | None, transform: InputTransform, *, heads: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of V with the transform of the output projection's input folded in: (heads * size, in), (heads * size,).

    Attention mixes tokens and leaves channels alone, so any T that stays inside each head passes through it: scales, rotations
    whose block divides the head, permutations within heads. ShapeError if `transform` mixes heads.
    """
    size = weight.shape[0] // heads
    blocks = [part.shape[0] for part in (transform.rotation, transform.second_rotation) if part is not None]
    blocks += [transform.hadamard_block] if transform.hadamard_block else []
    if any(size % block for block in blocks):
        raise ShapeError(
            f"values: rotation blocks {blocks} mix heads of {size} channels; use blocks that divide {size}, "
            "or leave the transform online."
        )
    if transform.permutation is not None:
        target = torch.arange(len(transform.permutation)) // size
        if not torch.equal(transform.permutation.long() // size, target):
            raise ShapeError("values: the permutation moves channels between heads; permute within heads only.")
    return fold_into_linear(weight, bias, transform)


def fold_through_activation(weight: Tensor, bias: Tensor | None, transform: InputTransform) -> tuple[Tensor, Tensor]:
    """Weight and bias of fc1 with the permutation of fc2's input folded in.

    An elementwise activation between them, such as GELU, commutes with a permutation and with nothing else.
    ShapeError if `transform` holds more than that.
    """
    if not transform._replace(permutation=None).is_identity:
        raise ShapeError(
            f"activation: only a permutation passes through it, got {transform.describe()}; leave scale and rotation online."
        )
    return fold_into_linear(weight, bias, transform)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A float64 copy of the bias (out,), zeros where the linear has none: a folded shift needs a place."""
    return torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double().clone()
