"""Fit one input tensor: its transform for each time group, the integer weights behind it, and the do-no-harm check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError
from trdq_core.numerics.affine import fake_quantize_static, fake_quantize_tokens
from trdq_core.plan import InputGroup
from trdq_core.statistics import LayerStatistics
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.fit import fit_transform
from trdq_core.weights.rounding import QuantizedWeight, dequantize_weight, quantize_weight

FIT_ROWS = 256  # token rows a transform is fitted on, at most
GATE_ROWS = 256  # held-out rows the do-no-harm check looks at, for each set


class FittedInput(NamedTuple):
    """One input tensor, fitted: a transform and integer weights for each set, and what the do-no-harm check saw."""

    group: InputGroup
    transforms: tuple[InputTransform, ...]
    weights: dict[str, tuple[QuantizedWeight, ...]]
    error_with: float  # squared output error over squared output, on held-out rows, with the recipe's transform
    error_without: float  # the same without any transform
    kept: bool


def fit_input(
    group: InputGroup,
    weights: Mapping[str, Tensor],
    statistics: LayerStatistics,
    steps_of_sets: Sequence[Sequence[int]],
    *,
    do_no_harm: bool = True,
    seed: int = 0,
) -> FittedInput:
    """Fit every set of one input. `weights` are (out, in) by layer name, `steps_of_sets` the timestep indices of each set."""
    name = group.layers[0].name
    for layer, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise CalibrationError(f"{layer}: its weight holds NaN or infinity; load an undamaged model.")
    splits = [_split(statistics.rows_at(steps)) for steps in steps_of_sets]
    plain = (InputTransform(),) * len(splits)
    if not group.rule.transforms:
        quantized = _quantize(group, weights, plain)
        return FittedInput(group, plain, quantized, *(_error(group, weights, quantized, plain, splits),) * 2, True)
    transforms = []
    for steps, (fit_rows, _) in zip(steps_of_sets, splits, strict=True):
        smooth = next((spec for spec in group.rule.transforms if spec.kind == "smooth"), group.rule.transforms[0])
        absmax = statistics.absmax(steps, smooth)
        transforms.append(
            fit_transform(
                group.rule.transforms,
                rows=fit_rows,
                absmax=absmax,
                weights=list(weights.values()),
                seed=seed,
                layer=name,
            )
        )
    fitted = tuple(transforms)
    quantized = _quantize(group, weights, fitted)
    error_with = _error(group, weights, quantized, fitted, splits)
    quantized_plain = _quantize(group, weights, plain[:1])
    repeated = {layer: parts * len(splits) for layer, parts in quantized_plain.items()}
    error_without = _error(group, weights, repeated, plain, splits)
    if do_no_harm and error_without < error_with:
        return FittedInput(group, plain, repeated, error_with, error_without, False)
    return FittedInput(group, fitted, quantized, error_with, error_without, True)


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out, both spread over all timesteps of the set."""
    fit_rows, held_out = rows[::2], rows[1::2]
    return (
        fit_rows[:: max(1, -(-len(fit_rows) // FIT_ROWS))],
        held_out[:: max(1, -(-len(held_out) // GATE_ROWS))],
    )


def _quantize(
    group: InputGroup, weights: Mapping[str, Tensor], transforms: Sequence[InputTransform]
) -> dict[str, tuple[QuantizedWeight, ...]]:
    spec = group.rule.weight
    assert spec is not None  # groups only hold quantized layers
    return {
        name: tuple(quantize_weight(t.apply_to_weight(weight), spec, layer=name) for t in transforms)
        for name, weight in weights.items()
    }


def _error(
    group: InputGroup,
    weights: Mapping[str, Tensor],
    quantized: Mapping[str, Sequence[QuantizedWeight]],
    transforms: Sequence[InputTransform],
    splits: Sequence[tuple[Tensor, Tensor]],
) -> float:
    """Squared error of all outputs over their squared size, on held-out rows of all sets."""
    activation = group.rule.activation
    assert activation is not None
    wrong = total = 0.0
    grid = {"bits": activation.bits, "symmetric": activation.symmetric}
    for index, (transform, (fit_rows, rows)) in enumerate(zip(transforms, splits, strict=True)):
        if activation.dynamic:
            seen = fake_quantize_tokens(transform.apply(rows), **grid)
        else:
            seen = fake_quantize_static(transform.apply(rows), transform.apply(fit_rows), **grid)
        for name, weight in weights.items():
            exact = rows @ weight.float().T
            got = seen @ dequantize_weight(quantized[name][index]).float().T
            wrong += float((got - exact).square().sum())
            total += float(exact.square().sum())
    return wrong / max(total, 1e-30)
