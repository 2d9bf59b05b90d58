"""What a conversion may ask of the whole model again, beyond the statistics: each pass samples or differentiates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from trdq_core.attention_products import QuantizedProducts
from trdq_core.errors import CalibrationError
from trdq_core.fitting import FittedInput
from trdq_core.nn.input_grid import Range, range_of
from trdq_core.plan import LayerInfo
from trdq_core.scale_search import OutputSamples
from trdq_core.specs import AttentionSpec, QuantSpec, Recipe
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeContext, TimeGroups

Ranges = Mapping[str, tuple[Range, ...]]  # by the linear that owns the input: one pair for each set or time group


class RangeRequest(NamedTuple):
    """A static input whose ranges are wanted: one, one for each set, or one for each time group."""

    fitted: FittedInput
    spec: QuantSpec
    count: int

    def from_rows(self, groups: TimeGroups, statistics: Statistics) -> tuple[Range, ...]:
        """Ranges searched on the sampled rows of each set's timesteps, behind its transform; or found with the weights."""
        layer = statistics.layer(self.fitted.group.statistics_name)
        found = []
        for index in range(self.count):
            steps = statistics.steps_of(groups, index) if self.count > 1 else range(len(statistics.timesteps))
            sets = self.fitted.distinct
            one = sets[index if len(sets) > 1 else 0]
            if one.range is not None:
                found.append(one.range)
                continue
            found.append(range_of(one.transform.apply(layer.rows_at(steps)), self.spec))
        return tuple(found)


class ModelPasses(NamedTuple):
    """The passes that are at hand. A recipe that needs one which is not there is refused by its name."""

    ranges: Callable[[Mapping[str, RangeRequest], TimeGroups], Ranges] | None = None
    curvature: Callable[[Sequence[LayerInfo]], Mapping[str, OutputSamples]] | None = None
    reconstruction: (
        Callable[[Sequence[FittedInput], Ranges, Recipe], tuple[list[FittedInput], dict[str, Any]]] | None
    ) = None
    attention: Callable[[nn.Module, AttentionSpec, TimeGroups, TimeContext], QuantizedProducts] | None = None

    def observed_ranges(self, requests: Mapping[str, RangeRequest], groups: TimeGroups) -> Ranges:
        """The ranges that every value of the calibration falls into."""
        if self.ranges is None:
            raise _missing(next(iter(requests)), "static activation ranges need a second calibration pass", "ranges")
        return self.ranges(requests, groups)

    def measured_curvature(self, layers: Sequence[LayerInfo]) -> Mapping[str, OutputSamples]:
        """How much the model's output curves in the outputs of `layers`."""
        if self.curvature is None:
            raise _missing(layers[0].name, 'range "output" needs a pass with gradients', "curvature")
        return self.curvature(layers)

    def reconstructed(
        self, fits: Sequence[FittedInput], ranges: Ranges, recipe: Recipe
    ) -> tuple[list[FittedInput], dict[str, Any]]:
        """The fits with learnt rounding, and facts for the report."""
        if self.reconstruction is None:
            raise _missing(recipe.name, "learning the rounding needs passes over the model", "reconstruction")
        return self.reconstruction(fits, ranges, recipe)

    def quantized_attention(
        self, denoiser: nn.Module, spec: AttentionSpec, groups: TimeGroups, time: TimeContext
    ) -> QuantizedProducts:
        """Put quantized attention products into `denoiser`."""
        if self.attention is None:
            raise _missing(
                "attention", "quantized attention products need a calibration pass of their own", "attention"
            )
        return self.attention(denoiser, spec, groups, time)


NO_PASSES = ModelPasses()


def _missing(where: str, why: str, name: str) -> CalibrationError:
    return CalibrationError(f"{where}: {why}; pass passes=ModelPasses({name}=...).")
