"""Weight and activation scales found in turns, each for the least output error (PTQ4ViT; TQ-DiT, arXiv 2502.04056).

The error of rows x is sum(weight * (Q_A(x) Q_W(W)^T - x W^T)^2); the weight says how much each output matters, and is
`second_order.output_weights`, or nothing for the plain squared error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError
from trdq_core.numerics.affine import TINY, choose_qparams, fake_quantize
from trdq_core.numerics.candidates import ROUNDS, scale_candidates
from trdq_core.numerics.ranges import static_range
from trdq_core.numerics.twin_region import SCALES, SignGrid
from trdq_core.specs import QuantSpec
from trdq_core.weights.grids import WeightGrid, fit_grid


class OutputSamples(NamedTuple):
    """Rows of one linear's input, and how much the prediction depends on its outputs at the same tokens."""

    inputs: Tensor  # (rows, in) fp16
    weight: Tensor  # (rows, out) fp32, E[g^2] over the probes
    timesteps: Tensor  # (rows,) fp32


class SearchedScales(NamedTuple):
    """What `search_scales` found: the grid of each weight, and the range of the input they share."""

    grids: dict[str, WeightGrid]
    range: tuple[float, float]


def search_scales(
    inputs: Tensor,
    weights: Mapping[str, Tensor],
    weight_spec: QuantSpec,
    activation_spec: QuantSpec,
    output_weights: Mapping[str, Tensor] | None = None,
    *,
    limits: tuple[float, float] | None = None,
) -> SearchedScales:
    """Grids of all linears that read `inputs` (rows, in) of T(x), and its static range: three rounds of turns at most.

    `weights` (out, in) and `output_weights` (rows, out) go by the linear's name; `activation_spec` is static. A side whose
    spec has range "output" is searched while the other is held; the range of another spec is `limits`, or taken from the
    rows as that spec says. Weights are scored on the quantized inputs, against the exact weights on the same inputs.
    """
    names = list(weights)
    stacked = torch.cat([weights[name] for name in names])
    importance = None if output_weights is None else torch.cat([output_weights[name] for name in names], 1)
    searched = activation_spec.range == "output"
    if limits is None:
        limits = static_range(
            inputs,
            bits=activation_spec.bits,
            symmetric=activation_spec.symmetric,
            range="minmax" if activation_spec.range == "output" else activation_spec.range,
            clip=1.0 if searched else activation_spec.clip,
            percentile=activation_spec.percentile,
            momentum=activation_spec.momentum,
        )
    grids: dict[str, WeightGrid] = {}
    for _ in range(ROUNDS):
        before = limits
        seen = quantize_inputs(inputs, activation_spec, limits)
        for name in names:
            importance_here = None if output_weights is None else output_weights[name]
            grids[name] = fit_grid(weights[name], weight_spec, layer=name, inputs=seen, output_weight=importance_here)
        if searched:
            values = torch.cat([grids[name].nearest(weights[name]) for name in names])
            limits = search_activation_range(inputs, stacked, values, activation_spec, importance)
        if limits == before or weight_spec.range != "output":
            break  # the weights would see the same inputs again, or do not look at them
    return SearchedScales(grids, limits)


def search_activation_range(
    inputs: Tensor,
    weight: Tensor,
    values: Tensor,
    spec: QuantSpec,
    output_weight: Tensor | None = None,
) -> tuple[float, float]:
    """The static range (low, high) of `inputs` (rows, in) with the least output error, min-max among those tried.

    `weight` (out, in) is the exact one, `values` (out, in) what its grid makes of it, `output_weight` (rows, out).
    """
    if not inputs.numel() or not torch.isfinite(inputs).all():
        raise CalibrationError(
            "activation range: the sampled inputs are missing or not finite; calibrate the model again."
        )
    inputs, weight, values = inputs.float(), weight.float(), values.float().T
    exact = inputs @ weight.T
    best, least = None, float("inf")
    for limits in input_ranges(inputs, spec):
        wrong = (quantize_inputs(inputs, spec, limits) @ values).sub_(exact).square_()
        error = float((wrong if output_weight is None else wrong.mul_(output_weight)).double().sum())
        if best is None or error < least:
            best, least = limits, error
    assert best is not None  # there are always candidates
    return best


def quantize_inputs(inputs: Tensor, spec: QuantSpec, limits: tuple[float, float]) -> Tensor:
    """`inputs` on the static grid of `spec` over a range."""
    if spec.grid == "twin_region":
        return sign_grid(limits, spec.bits).fake_quantize(inputs)
    low, high = (torch.tensor(limit) for limit in limits)
    return fake_quantize(inputs, choose_qparams(low, high, bits=spec.bits, symmetric=spec.symmetric), bits=spec.bits)


def sign_grid(limits: tuple[float, float], bits: int) -> SignGrid:
    """The twin-region grid of an activation function's outputs whose ends are the range (low, high)."""
    half, (low, high) = 2 ** (bits - 1), limits
    return SignGrid(max(-low, TINY) / half, max(high, TINY) / (half - 1), bits)


def input_ranges(inputs: Tensor, spec: QuantSpec) -> Iterator[tuple[float, float]]:
    """What is tried: the range of the values themselves, and that many times as large.

    On a twin-region grid only the upper end moves: the lower one is where the activation function ends.
    """
    low, high = min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))
    if spec.grid == "uniform" and not spec.symmetric:
        for factor in (1.0, *SCALES):
            yield low * factor, high * factor
        return
    twin = spec.grid == "twin_region"
    for scale in scale_candidates(torch.tensor(high if twin else max(-low, high)), spec.bits):
        limit = float(scale) * (2 ** (spec.bits - 1) - 1)
        yield (low if twin else -limit), limit
