"""One set of one input: a transform, the weights on their grids behind it, a low-rank branch, the clip of the input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.nn.input_grid import InputGrid, Range, range_of
from trdq_core.plan import InputGroup
from trdq_core.scale_search import OutputSamples, search_scales
from trdq_core.specs import LowRankSpec, QuantSpec, TransformSpec
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.fit import find_smoothing, fit_transform
from trdq_core.transforms.smoothing import Smoothing
from trdq_core.weights.gptq import second_moments
from trdq_core.weights.grids import WeightGrid, fit_grid
from trdq_core.weights.low_rank import fit_low_rank
from trdq_core.weights.rounding import Weight, dequantize_weight, quantize_weight
from trdq_core.weights.stacked import StackedWeights

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
OVERFIT = 1.3  # error on other prompts over that on the rows fitted on, above which GPTQ is damped
DAMPINGS = (0.1, 1.0)  # in shares of the mean squared input
SEARCH_ROWS = 128  # rows that a search scores its candidates on
SEARCH_OUTPUTS = 1024  # outputs, evenly chosen where there are more


class Rows(NamedTuple):
    """Calibration rows (rows, channels) fp32 of one set: to fit on, held out to judge, and plentiful for second moments."""

    fit: Tensor
    held_out: Tensor
    many: Tensor


class FittedSet(NamedTuple):
    """What one time group's set consists of. The low-rank factors act on the untransformed input."""

    transform: InputTransform
    weights: dict[str, Weight]
    clip: float = 1.0
    low_rank_down: Tensor | None = None  # (rank, in)
    low_rank_up: dict[str, Tensor] = {}  # (out, rank) of each linear  # noqa: RUF012 - never written to
    range: Range | None = None  # of a static input, where it was searched together with the weights
    grids: dict[str, WeightGrid] = {}  # noqa: RUF012 - kept where the rounding is still to be learnt


def fit_chain(
    group: InputGroup,
    chain: Sequence[TransformSpec],
    weights: Mapping[str, Tensor],
    rows: Rows,
    absmax: Tensor,
    seed: int,
    smoothing: Smoothing | None = None,
) -> InputTransform:
    """The transform of one set. `weights` are (out, in) by layer name, `absmax` (channels,)."""
    return fit_transform(
        chain, rows=rows.fit, absmax=absmax, weights=list(weights.values()), seed=seed, layer=group.layers[0].name,
        smoothing=smoothing,
    )  # fmt: skip


def search_chain(
    group: InputGroup,
    chain: Sequence[TransformSpec],
    weights: Mapping[str, Tensor],
    rows: Rows,
    absmax: Tensor,
    seed: int,
) -> Smoothing | None:
    """The smoothing of all sets of an input, searched on rows and absmax of the whole time axis; None if none is open.

    Each set takes the scales that it makes of the set's own absmax, so time still tells in them.
    """
    if not any(spec.kind == "smooth" and spec.alpha is None for spec in chain):
        return None
    sample = rows.fit[:: -(-len(rows.fit) // SEARCH_ROWS)]
    return find_smoothing(
        chain, rows=rows.fit, absmax=absmax, weights=list(weights.values()), seed=seed, layer=group.layers[0].name,
        output_error=lambda candidate: _quick_error(group, candidate, weights, sample),
    )  # fmt: skip


def fit_set(
    group: InputGroup,
    transform: InputTransform,
    weights: Mapping[str, Tensor],
    rows: Rows,
    curvature: Mapping[str, OutputSamples],
    seed: int,
) -> FittedSet:
    """The weights of one set behind its transform, with their low-rank branch, and the clip of the input."""
    fitted = _fit_weights(group, transform, weights, rows, curvature, seed)
    activation = group.rule.activation
    if activation is not None and activation.dynamic and activation.range == "mse":
        fitted = fitted._replace(clip=_search_clip(group, fitted, weights, rows.fit))
    elif activation is not None:
        fitted = fitted._replace(clip=activation.clip)
    return fitted


def output_error(
    group: InputGroup, fitted: FittedSet, weights: Mapping[str, Tensor], rows: Rows
) -> tuple[float, float]:
    """Squared error of all outputs on the held-out rows, and their squared size."""
    return _error(fitted, weights, rows.held_out, input_grid(group.rule.activation, fitted, rows.fit))


def input_grid(spec: QuantSpec | None, fitted: FittedSet, rows: Tensor) -> InputGrid:
    """The grid of one set's input; a static one spans `rows` until the second pass has seen everything."""
    if spec is None or spec.dynamic:
        return InputGrid(spec, clips=(fitted.clip,))
    return InputGrid(spec, ranges=(fitted.range or range_of(fitted.transform.apply(rows), spec),))


def _fit_weights(
    group: InputGroup,
    transform: InputTransform,
    weights: Mapping[str, Tensor],
    rows: Rows,
    curvature: Mapping[str, OutputSamples],
    seed: int,
) -> FittedSet:
    rule = group.rule
    assert rule.weight is not None  # groups only hold quantized layers
    transformed = {name: transform.apply_to_weight(weight) for name, weight in weights.items()}
    if rule.weight.range == "output" or (rule.activation is not None and rule.activation.range == "output"):
        return _searched_by_output(group, transform, transformed, curvature)
    inputs = transform.apply(rows.many) if rule.rounding == "gptq" or rule.low_rank is not None else None
    if rule.low_rank is not None:
        return _with_low_rank(
            group, rule.low_rank, transform, transformed, inputs, transform.apply(rows.held_out), seed
        )
    if rule.rounding == "gptq":
        assert inputs is not None  # transformed above for this
        return _rounded_by_gptq(transform, transformed, rule.weight, inputs, weights, rows)
    fitted = {name: quantize_weight(weight, rule.weight, layer=name) for name, weight in transformed.items()}
    if rule.rounding != "adaround":
        return FittedSet(transform, fitted)
    grids = {name: fit_grid(weight, rule.weight, layer=name) for name, weight in transformed.items()}
    return FittedSet(transform, fitted, grids=grids)


def _rounded_by_gptq(
    transform: InputTransform,
    transformed: Mapping[str, Tensor],
    spec: QuantSpec,
    inputs: Tensor,
    weights: Mapping[str, Tensor],
    rows: Rows,
) -> FittedSet:
    """GPTQ bends a weight towards the rows it sees. Where rows of other prompts fare much worse, they choose among more
    damping and rounding to nearest: what reads text, or what attention made of it, moves in few directions a prompt."""
    exact, moments, stacked = InputGrid(None), second_moments(inputs), StackedWeights(transformed, spec)

    def encoded(values: Mapping[str, Tensor]) -> FittedSet:
        return FittedSet(transform, {name: stacked.grids[name].encode(each) for name, each in values.items()})

    fitted = encoded(stacked.gptq(moments))
    (seen, size), (unseen, other_size) = (_error(fitted, weights, part, exact) for part in (rows.fit, rows.held_out))
    if unseen * size <= OVERFIT * seen * other_size:
        return fitted
    others = [stacked.nearest(), *(stacked.gptq(moments, damping) for damping in DAMPINGS)]
    candidates = [fitted, *map(encoded, others)]
    return min(candidates, key=lambda one: _error(one, weights, rows.held_out, exact)[0])


def _searched_by_output(
    group: InputGroup,
    transform: InputTransform,
    transformed: Mapping[str, Tensor],
    curvature: Mapping[str, OutputSamples],
) -> FittedSet:
    """Scales of weights and input searched in turns for the least output error, weighted with the curvature (TQ-DiT)."""
    weight, activation = group.rule.weight, group.rule.activation
    assert weight is not None  # groups only hold quantized layers
    samples = [curvature[name] for name in transformed]
    inputs = transform.apply(samples[0].inputs.float())
    importance = {name: each.weight for name, each in zip(transformed, samples, strict=True)}
    if activation is None or activation.dynamic or activation.grid != "uniform":
        limits = None
        seen = inputs if activation is None else _first_grid(activation, inputs).round(inputs)
        grids = {
            name: fit_grid(each, weight, layer=name, inputs=seen, output_weight=importance[name])
            for name, each in transformed.items()
        }
    else:
        found = search_scales(inputs, transformed, weight, activation, importance)
        grids, limits = found.grids, found.range
    fitted = {name: grids[name].encode(grids[name].nearest(each.double())) for name, each in transformed.items()}
    return FittedSet(transform, fitted, range=limits)


def _first_grid(spec: QuantSpec, inputs: Tensor) -> InputGrid:
    """The input's grid before anything but its own values is known."""
    return InputGrid(spec, (spec.clip,)) if spec.dynamic else InputGrid(spec, ranges=(range_of(inputs, spec),))


def _with_low_rank(
    group: InputGroup,
    low_rank: LowRankSpec,
    transform: InputTransform,
    transformed: Mapping[str, Tensor],
    inputs: Tensor | None,
    held_out: Tensor,
    seed: int,
) -> FittedSet:
    """The branch is fitted behind the transform and then folded in front of it: T(x) L^T = x (L M^T)^T with T(x) = x M."""
    spec = group.rule.weight
    assert spec is not None and inputs is not None  # the caller transformed the rows for this
    branch = fit_low_rank(
        list(transformed.values()), spec, low_rank, inputs=inputs, held_out=held_out, rounding=group.rule.rounding,
        layers=list(transformed), seed=seed,
    )  # fmt: skip
    matrix = transform.apply(torch.eye(inputs.shape[1], dtype=torch.float64))
    down = (branch.down.double() @ matrix.T).float()
    ups = dict(zip(transformed, branch.ups, strict=True))
    grids: dict[str, WeightGrid] = {}
    if group.rule.rounding == "adaround":
        grids = {
            name: fit_grid(weight - ups[name].double() @ branch.down.double(), spec, layer=name)
            for name, weight in transformed.items()
        }
    weights = dict(zip(transformed, branch.weights, strict=True))
    return FittedSet(transform, weights, low_rank_down=down, low_rank_up=ups, grids=grids)


def _quick_error(group: InputGroup, transform: InputTransform, weights: Mapping[str, Tensor], rows: Tensor) -> float:
    """The output error of a candidate transform with weights rounded to nearest over their full range: for searches."""
    assert group.rule.weight is not None  # groups only hold quantized layers
    spec = dataclasses.replace(group.rule.weight, range="minmax")
    fitted = FittedSet(transform, {}, clip=1.0 if group.rule.activation is None else group.rule.activation.clip)
    seen = input_grid(group.rule.activation, fitted, rows).round(transform.apply(rows))
    wrong = 0.0
    stride = -(-sum(len(weight) for weight in weights.values()) // SEARCH_OUTPUTS)
    for name, whole in weights.items():
        weight = whole[::stride]
        transformed = transform.apply_to_weight(weight)
        rounded = fit_grid(transformed, spec, layer=name).nearest(transformed).float()
        wrong += float((seen @ rounded.T - rows @ weight.float().T).square().sum())
    return wrong


def _search_clip(group: InputGroup, fitted: FittedSet, weights: Mapping[str, Tensor], rows: Tensor) -> float:
    """The clip factor of the live ranges with the least output error; no clipping is always a candidate."""
    errors = [
        (_error(fitted, weights, rows, InputGrid(group.rule.activation, clips=(ratio,)))[0], -ratio)
        for ratio in CLIP_RATIOS
    ]
    return -min(errors)[1]


def _error(fitted: FittedSet, weights: Mapping[str, Tensor], rows: Tensor, grid: InputGrid) -> tuple[float, float]:
    seen = grid.round(fitted.transform.apply(rows))
    wrong = total = 0.0
    for name, weight in weights.items():
        exact = rows @ weight.float().T
        got = seen @ dequantize_weight(fitted.weights[name], torch.float32).T
        if fitted.low_rank_down is not None:
            got = got + (rows @ fitted.low_rank_down.T) @ fitted.low_rank_up[name].float().T
        wrong += float((got - exact).square().sum())
        total += float(exact.square().sum())
    return wrong, total
