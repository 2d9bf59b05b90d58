"""Calibrations and what was observed in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from studio.services.core import Core
from trdq_core.specs import Recipe


class LayerView(NamedTuple):
    """What the Activations page draws for one layer and group."""

    layer: str
    group: str
    histograms: Any
    recipe: Recipe


class TimelineView(NamedTuple):
    """Channel absmax over the timesteps, and the inner edges of the groups."""

    layer: str
    timeline: Any
    edges: list[float]


@dataclass(frozen=True)
class Statistics:
    """Reads stored calibrations by fingerprints that the core listed."""

    core: Core

    def calibrations(self, model: str | None = None) -> list[Any]:
        """The stored calibrations, newest first."""
        return list(self.core.runs.list_calibrations(model))

    def choices(self, model: str | None) -> list[tuple[str, str]]:
        """The calibrations of a model for a dropdown."""
        return [(title(info), info.fingerprint) for info in self.calibrations(model)]

    def find(self, fingerprint: str | None) -> Any | None:
        """The calibration with this fingerprint if the core lists one."""
        return next((info for info in self.calibrations() if info.fingerprint == fingerprint), None)

    def usual_seconds(self, model: str | None) -> float | None:
        """How long the newest calibration of this model took here; none if there was none."""
        return next((float(info.seconds) for info in self.calibrations(model) if info.seconds), None)

    def layers(self, info: Any) -> list[str]:
        """The observed layers in model order."""
        return list(self.core.inspection.layers(Path(info.folder)))

    def group_labels(self, info: Any, layer: str, recipe: Recipe) -> list[str]:
        """One label for each timestep group of the recipe."""
        timeline = self.core.inspection.channel_timeline(Path(info.folder), layer)
        return list(self.core.inspection.group_labels(recipe, timeline.timesteps, Path(info.folder)))

    def timeline(self, info: Any, layer: str, recipe: Recipe) -> TimelineView:
        """The channel absmax of a layer over the timesteps."""
        timeline = self.core.inspection.channel_timeline(Path(info.folder), layer)
        edges = self.core.inspection.group_edges(recipe, timeline.timesteps, Path(info.folder))
        return TimelineView(layer, timeline, list(edges))

    def histograms(self, info: Any, recipe: Recipe, layer: str, group: int, label: str) -> LayerView:
        """The values of a layer's input in one group, before and after the recipe's transform."""
        found = self.core.inspection.histograms(Path(info.folder), info.model, recipe, layer, group)
        return LayerView(layer, label, found, recipe)


def title(info: Any) -> str:
    """One line that tells calibrations apart."""
    when = str(info.created).replace("T", " ")[:16]
    settings = f"{info.steps} steps · guidance {info.guidance:g} · seed {info.seed}"
    return f"{when} · {info.prompts} prompts · {settings} · {info.fingerprint[:8]}"
