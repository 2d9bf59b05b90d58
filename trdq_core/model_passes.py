"""The passes of a conversion over a loaded model and its calibration: ranges, curvature, rounding, attention products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trdq_core.attention_products import QuantizedProducts, apply_attention, fit_attention
from trdq_core.calibration import observe_ranges
from trdq_core.events import OnEvent
from trdq_core.fitting import FittedInput
from trdq_core.passes import ModelPasses, RangeRequest, Ranges
from trdq_core.plan import LayerInfo
from trdq_core.reconstruction.run import reconstruct
from trdq_core.reconstruction.units import UnitLinear
from trdq_core.sampling import SampledModel
from trdq_core.scale_search import OutputSamples
from trdq_core.second_order import output_weights
from trdq_core.specs import AttentionSpec, Recipe
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeContext, TimeGroups
from trdq_core.weights.rounding import Weight

CURVATURE_ROWS = 192  # each layer; the search tries some hundred scales on them
Announce = Callable[[str, str], None]  # stage and what it does, as a new one begins


def make_passes(
    model: SampledModel,
    statistics: Statistics,
    recipe: Recipe,
    *,
    folder: Path,
    seed: int,
    announce: Announce,
    on_event: OnEvent,
    cancelled: Callable[[], bool] | None,
) -> ModelPasses:
    """Every pass over `model`, on the prompts of its calibration. Units whose rounding is learnt are kept in `folder`, so
    that a stopped run goes on from them."""
    reports: dict[str, Any] = {"on_event": on_event, "cancelled": cancelled}

    def ranges(requests: Mapping[str, RangeRequest], groups: TimeGroups) -> Ranges:
        announce("observe", f"Second pass: activation ranges of {recipe.name}")
        return observe_ranges(model, statistics, requests, groups, **reports)

    def curvature(layers: Sequence[LayerInfo]) -> Mapping[str, OutputSamples]:
        announce("observe", f"How much the prediction depends on each layer, for {recipe.name}")
        return output_weights(
            model, statistics.about, [layer.name for layer in layers], rows=CURVATURE_ROWS, seed=seed, **reports
        )

    def reconstruction(
        fits: Sequence[FittedInput], found: Ranges, asked: Recipe
    ) -> tuple[list[FittedInput], dict[str, Any]]:
        announce("reconstruct", f"Learning the rounding of {asked.name}")
        learned = reconstruct(
            model,
            unit_linears(model.denoiser, fits, found),
            asked,
            statistics,
            folder=folder / f"{asked.name}-{statistics.about['fingerprint']}",
            groups=statistics.groups(asked.time),
            seed=seed,
            **reports,
        )
        return with_weights(fits, learned.weights), {"units": learned.facts()}

    def attention(denoiser: nn.Module, spec: AttentionSpec, groups: TimeGroups, time: TimeContext) -> QuantizedProducts:
        announce("observe", f"Grids of the attention products of {recipe.name}")
        return apply_attention(denoiser, fit_attention(model, spec, statistics.about, groups, **reports), time)

    return ModelPasses(ranges, curvature, reconstruction, attention)


def unit_linears(denoiser: nn.Module, fits: Sequence[FittedInput], ranges: Ranges) -> list[UnitLinear]:
    """The linears whose rounding is to be learnt, as they were fitted; their recipes have one set."""
    found = []
    for fitted in fits:
        one = fitted.sets[0]
        for name, grid in one.grids.items():
            weight, low_rank = denoiser.get_submodule(name).weight.detach().double(), None
            if one.low_rank_down is not None:
                low_rank = one.low_rank_up[name].double() @ one.low_rank_down.double()
                weight = weight - low_rank
            seen = fitted.grid(ranges.get(fitted.group.layers[0].name, ()))
            found.append(UnitLinear(name, one.transform, one.transform.apply_to_weight(weight), grid, seen, low_rank))
    return found


def with_weights(fits: Sequence[FittedInput], learned: Mapping[str, Weight]) -> list[FittedInput]:
    """The fits with learnt weights in place of those rounded to nearest."""
    changed = []
    for fitted in fits:
        one = fitted.sets[0]
        weights = {name: learned.get(name, weight) for name, weight in one.weights.items()}
        kept = one._replace(weights=weights, grids={}) if one.grids else one
        changed.append(fitted._replace(sets=(kept,) * len(fitted.sets)) if one.grids else fitted)
    return changed
