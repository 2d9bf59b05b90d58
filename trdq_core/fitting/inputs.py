"""Fit one input tensor: its transform for each time group, the integer weights behind it, and the do-no-harm check."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trdq_core.errors import CalibrationError
from trdq_core.fitting.one_set import FittedSet, Rows, fit_chain, fit_set, output_error, search_chain
from trdq_core.nn.input_grid import InputGrid, Range
from trdq_core.plan import InputGroup, check_shapes
from trdq_core.scale_search import OutputSamples
from trdq_core.specs import LayerRule, TransformSpec
from trdq_core.statistics import LayerStatistics
from trdq_core.transforms.base import InputTransform, aligned
from trdq_core.transforms.steps import resolve_adaptive
from trdq_core.weights.rounding import QuantizedWeight, Weight

FIT_ROWS = 256  # token rows a transform is fitted on, at most
GATE_ROWS = 256  # held-out rows the do-no-harm check looks at, for each set
HELD_OUT = 4  # one row in so many is held out
MANY_ROWS = 4096  # rows that second moments (GPTQ, low rank) are taken over, at most

Chain = tuple[TransformSpec, ...]


class FittedInput(NamedTuple):
    """One input tensor, fitted: a transform and integer weights for each set, and what the do-no-harm check saw."""

    group: InputGroup
    sets: tuple[FittedSet, ...]
    chain: Chain  # the transforms it ended with
    error_with: float  # squared output error over squared output, on held-out rows, with the recipe's transforms
    error_without: float  # the same without any transform
    kept: bool

    @property
    def transforms(self) -> tuple[InputTransform, ...]:
        """The transform of each set."""
        return tuple(one.transform for one in self.sets)

    @property
    def weights(self) -> dict[str, tuple[Weight, ...]]:
        """The weights of each linear, one for each set."""
        return {layer.name: tuple(one.weights[layer.name] for one in self.sets) for layer in self.group.layers}

    @property
    def distinct(self) -> tuple[FittedSet, ...]:
        """The sets that differ: an input without transforms has one, however many time groups there are."""
        return self.sets if any(one is not self.sets[0] for one in self.sets) else self.sets[:1]

    @property
    def packable(self) -> bool:
        """Whether the integer kernels take these weights."""
        return all(isinstance(weight, QuantizedWeight) for one in self.sets for weight in one.weights.values())

    def grid(self, ranges: Sequence[Range] = ()) -> InputGrid:
        """The grid of the input; `ranges` are those the second pass saw, for static grids."""
        return InputGrid(self.group.rule.activation, tuple(one.clip for one in self.distinct), tuple(ranges))


def fit_input(
    group: InputGroup,
    weights: Mapping[str, Tensor],
    statistics: LayerStatistics,
    steps_of_sets: Sequence[Sequence[int]],
    *,
    do_no_harm: bool = True,
    seed: int = 0,
    curvature: Mapping[str, OutputSamples] | None = None,
) -> FittedInput:
    """Fit every set of one input. `weights` are (out, in) by layer name, `steps_of_sets` the timestep indices of each set.

    Of the rule's chains of transforms the one with the least output error on held-out rows is taken; with `do_no_harm`
    having none is a candidate too. ShapeError names the layer that a group size or a rank does not fit.
    """
    check_shapes(group)
    for layer, weight in weights.items():
        if not torch.stack(torch.aminmax(weight)).isfinite().all():  # both are NaN if anything is
            raise CalibrationError(f"{layer}: its weight holds NaN or infinity; load an undamaged model.")
    rows = [split_rows(statistics, steps) for steps in steps_of_sets]
    whole = split_rows(statistics, range(len(statistics.rows))) if len(rows) > 1 else rows[0]
    judged = group._replace(rule=plain_rounding(group.rule))
    curvature = curvature or {}

    def fit(what: InputGroup, chain: Chain) -> tuple[FittedSet, ...]:
        if not chain:  # the weights do not depend on time, so they are fitted once
            return (fit_set(what, InputTransform(), weights, whole, curvature, seed),) * len(rows)
        pairs = zip(transforms[chain], rows, strict=True)
        return tuple(fit_set(what, transform, weights, part, curvature, seed) for transform, part in pairs)

    chains = [chain for chain in group.rule.chains if chain]
    transforms = {c: _fit_transforms(group, c, weights, statistics, steps_of_sets, rows, whole, seed) for c in chains}
    # Having no transform is judged in any case, for the report.
    fits = {chain: fit(judged, chain) for chain in dict.fromkeys((*group.rule.chains, ()))}
    errors = {chain: _relative_error(judged, sets, weights, rows) for chain, sets in fits.items()}
    wanted = min(group.rule.chains, key=errors.__getitem__)
    taken = () if do_no_harm and errors[()] < errors[wanted] else wanted
    sets = fits[taken] if judged.rule == group.rule else fit(group, taken)
    return FittedInput(group, sets, taken, errors[wanted], errors[()], taken == wanted)


def plain_rounding(rule: LayerRule) -> LayerRule:
    """The rule rounding to nearest without a low-rank branch: transforms are judged so, since what is fitted to the rows
    would take a multiple of the time and helps each of them."""
    return dataclasses.replace(rule, rounding="nearest", low_rank=None)


def split_rows(statistics: LayerStatistics, steps: Sequence[int]) -> Rows:
    """Rows to fit on and rows held out, both spread over all timesteps of the set.

    Rows stand in the order of the prompts they came from, so the last quarter is of other prompts: what is fitted too closely
    to a few texts or pictures shows there. Second moments want several rows a channel: a set whose own timesteps have too
    few takes those of the whole axis.
    """
    rows = statistics.rows
    first = rows.shape[1] - max(1, rows.shape[1] // HELD_OUT) if rows.shape[1] > 1 else 1
    own = rows[list(steps)]
    fit, held_out = own[:, :first].flatten(0, 1).float(), own[:, first:].flatten(0, 1).float()
    many = fit
    if len(many) < 4 * rows.shape[-1] and len(steps) < len(rows):
        many = rows[:, :first].flatten(0, 1).float()
    return Rows(
        _at_most(fit, FIT_ROWS), _at_most(held_out if len(held_out) else fit, GATE_ROWS), _at_most(many, MANY_ROWS)
    )


def _at_most(rows: Tensor, count: int) -> Tensor:
    return rows[:: max(1, -(-len(rows) // count))]


def _fit_transforms(
    group: InputGroup,
    chain: Chain,
    weights: Mapping[str, Tensor],
    statistics: LayerStatistics,
    steps_of_sets: Sequence[Sequence[int]],
    rows: Sequence[Rows],
    whole: Rows,
    seed: int,
) -> tuple[InputTransform, ...]:
    """The transforms of all sets with one chain."""
    smooth = next((spec for spec in chain if spec.kind == "smooth"), None)
    everything = range(len(statistics.rows))
    chain = resolve_adaptive(chain, statistics.rows_at(everything))  # all sets choose alike
    weight_absmax = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)

    def absmax(steps: Sequence[int]) -> Tensor:
        return statistics.absmax(steps, smooth or chain[0], weight_absmax)

    smoothing = search_chain(group, chain, weights, whole, absmax(everything), seed)
    sets = zip(rows, steps_of_sets, strict=True)
    return aligned([fit_chain(group, chain, weights, part, absmax(steps), seed, smoothing) for part, steps in sets])


def _relative_error(
    group: InputGroup, fitted: Sequence[FittedSet], weights: Mapping[str, Tensor], rows: Sequence[Rows]
) -> float:
    parts = [output_error(group, one, weights, part) for one, part in zip(fitted, rows, strict=True)]
    return sum(wrong for wrong, _ in parts) / max(sum(total for _, total in parts), 1e-30)
