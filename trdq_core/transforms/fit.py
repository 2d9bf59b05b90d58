"""From a recipe's transform steps and a layer's statistics to the fitted transform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trdq_core.errors import RecipeError
from trdq_core.numerics.hadamard import hadamard, rotate_blocks
from trdq_core.specs import TransformSpec
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.rotation import greedy_rotation, serpentine_permutation
from trdq_core.transforms.smoothing import Smoothing, search_smoothing
from trdq_core.transforms.steps import resolve_adaptive, step_blocks

OutputError = Callable[[InputTransform], float]
Step = tuple[TransformSpec, int]  # a rotation or permutation and its block


def fit_transform(
    specs: Sequence[TransformSpec],
    *,
    rows: Tensor,
    absmax: Tensor,
    weights: Sequence[Tensor],
    seed: int,
    layer: str = "input",
    smoothing: Smoothing | None = None,
    output_error: OutputError | None = None,
) -> InputTransform:
    """The transform for one input tensor, fitted on its sampled rows (tokens, channels) and channel absmax (channels,).

    `weights` are those of all linears reading the tensor, (out, channels) each: they share the transform. A smooth step
    without alpha takes `smoothing`, or is searched with `output_error` as `find_smoothing` does it. An adaptive rotation looks
    at the RMS of `rows`; with several time groups call `resolve_adaptive` first, so that all of them choose alike.
    RecipeError if alpha is to be searched without `output_error`.
    """
    steps, smooth, values, weight_absmax = _prepared(specs, rows, weights, layer)
    if smooth is None:
        return _complete(steps, None, values, seed)
    if smooth.alpha is not None:
        smoothing = Smoothing(smooth.alpha)
    elif smoothing is None:
        smoothing = find_smoothing(
            specs, rows=rows, absmax=absmax, weights=weights, seed=seed, layer=layer, output_error=output_error
        )
    return _complete(steps, smoothing.scale(absmax, weight_absmax), values, seed)


def find_smoothing(
    specs: Sequence[TransformSpec],
    *,
    rows: Tensor,
    absmax: Tensor,
    weights: Sequence[Tensor],
    seed: int,
    layer: str = "input",
    output_error: OutputError | None = None,
) -> Smoothing:
    """The smoothing of a chain whose smooth step leaves alpha open: `output_error` quantizes with the transform it is handed
    and returns the layer's error.

    Candidates are judged inside the complete transform; greedy rotations, too dear to fit for each of them, are stood in for
    by a permutation and a Hadamard of the same block, which spread outliers about as well.
    """
    if output_error is None:
        raise RecipeError(f"{layer}: smooth without alpha is searched by the output error; give alpha here.")
    steps, _, values, weight_absmax = _prepared(specs, rows, weights, layer)
    quick = _stand_in(steps)
    return search_smoothing(
        lambda candidate: output_error(_complete(quick, candidate.scale(absmax, weight_absmax), values, seed))
    )


def _prepared(
    specs: Sequence[TransformSpec], rows: Tensor, weights: Sequence[Tensor], layer: str
) -> tuple[list[Step], TransformSpec | None, Tensor, Tensor]:
    """Steps with their blocks, the smooth step, the rows as floats, and the weights' channel absmax (channels,)."""
    resolved = resolve_adaptive(specs, rows)
    blocks = step_blocks(resolved, rows.shape[1], sum(map(len, weights)), layer=layer)
    absmax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).double()
    steps = [(spec, block) for spec, block in zip(resolved, blocks, strict=True) if spec.kind != "smooth"]
    smooth = next((spec for spec in resolved if spec.kind == "smooth"), None)
    return steps, smooth, rows.float(), absmax


def _complete(steps: Sequence[Step], scale: Tensor | None, values: Tensor, seed: int) -> InputTransform:
    """The transform that divides by `scale` and then takes `steps`, fitted on `values` (rows, channels) in this order."""
    generator = torch.Generator().manual_seed(seed)
    fitted = InputTransform()
    if scale is not None:
        fitted = fitted._replace(inverse_scale=(1 / scale).float())
        values = values * fitted.inverse_scale
    for spec, block in steps:
        if spec.kind == "hadamard":
            if spec.random_signs:
                fitted, values = _with_signs(fitted, values, generator)
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


def _with_signs(fitted: InputTransform, values: Tensor, generator: torch.Generator) -> tuple[InputTransform, Tensor]:
    """Random signs ahead of the Hadamard that comes next: H diag(+-1) of QuaRot (arXiv 2404.00456) without a step of its own.

    They go into the scale, or into the columns of a rotation that stands before, where they repeat from block to block.
    """
    channels = values.shape[1]
    size = channels if fitted.rotation is None else fitted.rotation.shape[0]
    signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
    if fitted.rotation is not None:
        fitted = fitted._replace(rotation=fitted.rotation * signs.half())
        signs = signs.repeat(channels // size)
    elif fitted.inverse_scale is not None:
        fitted = fitted._replace(inverse_scale=fitted.inverse_scale * signs)
    else:
        fitted = fitted._replace(inverse_scale=signs)
    return fitted, values * (signs if fitted.permutation is None else signs[fitted.permutation.long()])


def _stand_in(steps: Sequence[Step]) -> list[Step]:
    """`steps` if they are cheap; else a permutation and a Hadamard in the blocks of the greedy rotations."""
    greedy = next((step for step in steps if step[0].kind == "greedy_rotation"), None)
    if greedy is None:
        return list(steps)
    spec, block = greedy
    return [(dataclasses.replace(spec, kind=kind), block) for kind in ("serpentine", "hadamard")]
