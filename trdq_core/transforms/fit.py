"""From a recipe's transform steps and a layer's statistics to the fitted transform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trdq_core.numerics.hadamard import hadamard, rotate_blocks
from trdq_core.specs import TransformSpec
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.rotation import choose_block, greedy_rotation, serpentine_permutation

FLOOR = 1e-5  # channel ranges below it count as this, so that a dead channel keeps a finite scale


def smooth_scale(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """d (channels,) float64 = a^alpha / w^(1 - alpha): what activations are divided by (SmoothQuant, arXiv 2211.10438)."""
    a = activation_absmax.double().clamp_min(FLOOR)
    w = weight_absmax.double().clamp_min(FLOOR)
    return a.pow(alpha) / w.pow(1 - alpha)


def fit_transform(
    specs: Sequence[TransformSpec],
    *,
    rows: Tensor,
    absmax: Tensor,
    weights: Sequence[Tensor],
    seed: int,
    layer: str = "input",
) -> InputTransform:
    """The transform for one input tensor, fitted on its sampled rows (tokens, channels) and channel absmax (channels,).

    `weights` are those of all linears reading the tensor, (out, channels) each: they share the transform.
    """
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.cat([weight.double() for weight in weights])
    values = rows.float()
    fitted = InputTransform()
    for spec in specs:
        if spec.kind == "smooth":
            scale = smooth_scale(absmax, stacked.abs().amax(0), spec.alpha)
            fitted = fitted._replace(inverse_scale=(1 / scale).float())
            values = values * fitted.inverse_scale
            continue
        dense = spec.kind == "greedy_rotation" or any(s.kind == "greedy_rotation" for s in specs)
        block = choose_block(values.shape[1], len(stacked), spec.block, dense=dense, layer=layer)
        if spec.kind == "hadamard":
            fitted = fitted._replace(hadamard_block=block)
            values = rotate_blocks(values, hadamard(block))
        elif spec.kind == "serpentine":
            permutation = serpentine_permutation(values.abs().amax(0), block)
            fitted = fitted._replace(permutation=permutation)
            values = values[:, permutation.long()]
        else:
            rotation = greedy_rotation(values, block, spec.steps, generator).half()
            before_permutation = fitted.permutation is None and fitted.rotation is None and not fitted.hadamard_block
            fitted = fitted._replace(**{"rotation" if before_permutation else "second_rotation": rotation})
            values = rotate_blocks(values, rotation)
    return fitted
