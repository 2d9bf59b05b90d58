"""Stored measurements of how alike the guidance branches attend, and plans computed from them. Nothing is sampled here."""

from __future__ import annotations

import itertools
import json
import math
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from studio.services.core import Core
from studio.services.form import number, whole
from studio.services.parts import SPATIAL, TEMPORAL
from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.presets import published_sharing
from trdq_core.specs import SHARING_MEASURES, SharingMeasure, SharingSpec, TimeGroupSpec

Array = np.ndarray[Any, Any]
MEASURE_CHOICES: list[tuple[str, SharingMeasure]] = [
    ("Relative output error", "output_error"), ("Map cosine", "map_cosine"),
]  # fmt: skip
MEASURE_WORDS: dict[SharingMeasure, str] = {"output_error": "output error", "map_cosine": "map cosine"}
FILES = ("similarity.safetensors", "similarity.json")
MOST_GROUPS = 50
MOST_OPEN = 8  # measurements kept in memory; each is a few hundred kilobytes at most


class Measurement(NamedTuple):
    """One stored measurement, described without reading its numbers."""

    id: str  # of the run
    model: str
    title: str
    seconds: float


@dataclass(frozen=True)
class SimilarityView:
    """A measurement as the page draws it: timesteps rising, so that time runs to the right."""

    id: str
    source: Any  # the core's Similarity
    about: dict[str, Any]
    timesteps: Array  # (timesteps,)
    blocks: dict[SharingMeasure, Array]  # (timesteps, blocks); the cosine is the mean over the heads
    heads: dict[SharingMeasure, Array]  # (timesteps, blocks, heads)
    largest_saving: float  # share of the attention FLOPs if every block shared at every step
    part: str = SPATIAL  # where its blocks attend
    temporal: SimilarityView | None = None  # beside the spatial blocks of a clip, where they were measured

    @property
    def model(self) -> str:
        """The model that was measured."""
        return str(self.about["model"])

    @property
    def frame_by_frame(self) -> bool:
        """Whether what was measured attends within each frame of a clip, so that other blocks attend across them."""
        frames = self.about.get("frames")
        return isinstance(frames, int) and frames > 1

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return int(self.blocks["output_error"].shape[1])

    def gap(self, measure: SharingMeasure, values: Array) -> Array:
        """How far apart the branches are, 0 where they are equal: the error itself, or one minus the cosine."""
        return values if measure == "output_error" else 1 - values

    def widest(self, measure: SharingMeasure) -> float:
        """The largest gap of any block or head: the end of the colour range of every view."""
        parts = (self.gap(measure, self.blocks[measure]), self.gap(measure, self.heads[measure]))
        return max(float(max(part.max() for part in parts)), 1e-6)


@dataclass(frozen=True)
class Choice:
    """What a visitor chose to look at, as it came from the page."""

    measure: Any = "output_error"
    threshold: Any = 0.0
    groups: Any = 1
    source: Any = "threshold"
    block: Any = None  # the one least alike
    part: Any = SPATIAL


class SliderRange(NamedTuple):
    """The threshold slider for a measure: its ends, its step, and where it starts."""

    least: float
    most: float
    step: float
    start: float


class PlanView(NamedTuple):
    """A plan with what it foretells, as cells to draw and in a few words."""

    spec: SharingSpec
    shared: Array  # (timesteps, blocks) of bool
    groups: Array  # (timesteps,), the time group of each
    said: str  # where the plan comes from
    labels: tuple[str, ...]  # "500 to 1000", one a time group


@dataclass(frozen=True)
class Similarities:
    """The measurements in the data folder, found by run ids that the core listed."""

    core: Core
    _open: dict[str, SimilarityView] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def measurements(self, model: str) -> list[Measurement]:
        """The stored measurements of a model, newest first."""
        runs = [info for info in self.core.runs.list_runs() if info.command == "attention" and info.model == model]
        found = (_described(info) for info in runs)
        return [measurement for measurement in found if measurement is not None]

    def choices(self, model: str) -> list[tuple[str, str]]:
        """The measurements of a model for a dropdown."""
        return [(measurement.title, measurement.id) for measurement in self.measurements(model)]

    def open(self, run_id: str | None) -> SimilarityView | None:
        """The measurement of this run if the core lists one; CalibrationError if its files are damaged."""
        info = next((info for info in self.core.runs.list_runs() if info.id == run_id), None)
        if info is None or not _complete(Path(info.folder)):
            return None
        with self._lock:
            if info.id not in self._open:
                while len(self._open) >= MOST_OPEN:
                    self._open.pop(next(iter(self._open)))
                self._open[info.id] = self._load(info.id, Path(info.folder))
            return self._open[info.id]

    def asked(self, run_id: Any, choice: Choice) -> tuple[SimilarityView, Choice, PlanView]:
        """The measurement, the checked choice and its plan; TRDQError if there is no such thing.

        Plans share spatial attention only, so temporal blocks come with the plan that shares nothing.
        """
        view = self.open(run_id if isinstance(run_id, str) else None)
        if view is None:
            raise CalibrationError("measurement: it is not there any more; choose another, or press Measure.")
        part = TEMPORAL if choice.part == TEMPORAL and view.temporal is not None else SPATIAL
        choice = replace(choice, measure=check_measure(choice.measure), part=part)
        if part == TEMPORAL and view.temporal is not None:
            return view.temporal, choice, self.none(view.temporal)
        if choice.source == "published":
            return view, choice, self.published(view)
        if choice.source == "none":
            return view, choice, self.none(view)
        return view, choice, self.by_threshold(view, choice.measure, choice.threshold, choice.groups)

    def to_apply(self, run_id: Any, choice: Choice) -> tuple[SimilarityView, PlanView]:
        """The plan to put into comparisons; TRDQError while temporal blocks are looked at, which have none."""
        view, choice, plan = self.asked(run_id, choice)
        if choice.part == TEMPORAL:
            raise RecipeError("sharing plan: it is made from the spatial blocks; choose Spatial to see and apply it.")
        return view, plan

    def by_threshold(self, view: SimilarityView, measure: Any, threshold: Any, groups: Any) -> PlanView:
        """The plan of a threshold in uniform time groups; RecipeError for a value that cannot be used."""
        measure, limit = check_measure(measure), round(number("threshold", threshold), 6)
        if not 0 <= limit <= max(1.0, view.widest(measure)):
            raise RecipeError(f"threshold: got {limit:g}; give a {MEASURE_WORDS[measure]} from 0 to 1.")
        count = whole("time groups", groups, 1, MOST_GROUPS)
        if count > len(view.timesteps):
            raise RecipeError(
                f"time groups: got {count} for a measurement of {len(view.timesteps)} steps; use at most as many groups as steps."
            )
        cut = self.core.timegroups.make_groups(TimeGroupSpec(kind="uniform", count=count))
        spec = self.core.similarity.plan_sharing(view.source, cut, threshold=limit, measure=measure)
        relation = "at most" if measure == "output_error" else "at least"
        groups_said = "one time group" if count == 1 else f"{count} time groups"
        return self._view(view, spec, f"{MEASURE_WORDS[measure]} {relation} {limit:g}, {groups_said}")

    def published(self, view: SimilarityView) -> PlanView:
        """The list of the released TR-DQ, scaled to this model, with what the measurement foretells for it."""
        return self._view(view, published_sharing(view.count), "the published list, scaled to this depth")

    def none(self, view: SimilarityView) -> PlanView:
        """No sharing at all."""
        return self._view(view, SharingSpec(blocks=((),)), "none")

    def _view(self, view: SimilarityView, spec: SharingSpec, said: str) -> PlanView:
        spec = self.core.similarity.predict(view.source, spec)
        cut = self.core.timegroups.TimeGroups(spec.edges)
        groups = np.array([cut.group_of(float(timestep)) for timestep in view.timesteps])
        return PlanView(spec, shared_cells(view.count, spec, groups), groups, said, group_labels(spec.edges))

    def _load(self, run_id: str, folder: Path) -> SimilarityView:
        source = self.core.similarity.Similarity.load(folder)
        view, temporal = self._read(run_id, source), source.temporal
        if temporal is None:
            return view
        return replace(view, temporal=replace(self._read(run_id, temporal), part=TEMPORAL))

    def _read(self, run_id: str, source: Any) -> SimilarityView:
        try:
            timesteps = np.asarray(source.timesteps, dtype=np.float64)
            order = np.argsort(timesteps)
            error, cosine, block = (
                np.asarray(getattr(source, name), dtype=np.float64)[order]
                for name in ("output_error", "map_cosine", "block_error")
            )
            if not len(order) == len(source.block_error) or not block.size or error.shape != cosine.shape:
                raise ValueError("shapes that do not belong together")
            everything = SharingSpec(blocks=(tuple(range(block.shape[1])),))
            most = float(self.core.similarity.predict(source, everything).predicted_saving)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as damage:
            if isinstance(damage, CalibrationError):
                raise
            raise CalibrationError(f"similarity {run_id}: damaged; measure it again.") from damage
        heads: dict[SharingMeasure, Array] = {"output_error": error, "map_cosine": cosine}
        blocks: dict[SharingMeasure, Array] = {"output_error": block, "map_cosine": cosine.mean(-1)}
        return SimilarityView(run_id, source, dict(source.about), timesteps[order], blocks, heads, most)


def check_measure(measure: Any) -> SharingMeasure:
    """`measure` if it is one; RecipeError otherwise."""
    if measure not in SHARING_MEASURES:
        raise RecipeError(f"measure: got {str(measure)[:40]!r}; allowed are {', '.join(SHARING_MEASURES)}.")
    return measure


def slider_range(view: SimilarityView, measure: SharingMeasure) -> SliderRange:
    """The threshold slider: from the most alike to the least alike block; it starts where a quarter of the blocks share."""
    values = view.blocks[measure]
    gaps = view.gap(measure, values)
    widest = max(float(gaps.max()), 1e-3)
    step = 10.0 ** math.floor(math.log10(widest / 100))
    digits = max(0, -round(math.log10(step)))
    start = math.ceil(float(np.quantile(gaps.max(0), 0.25, method="lower")) / step) * step
    end = math.ceil(widest / step) * step
    if measure == "output_error":
        return SliderRange(0.0, round(end, digits), step, round(min(start, end), digits))
    return SliderRange(round(1 - end, digits), 1.0, step, round(1 - min(start, end), digits))


def shared_cells(count: int, spec: SharingSpec, groups: Array) -> Array:
    """Which of `count` blocks the plan shares at each timestep, (timesteps, blocks) of bool, from the group of each."""
    cells = np.zeros((len(groups), count), dtype=bool)
    for group, blocks in enumerate(spec.blocks):
        for block in blocks:
            cells[groups == group, block] = True
    return cells


def group_labels(edges: tuple[float, ...]) -> tuple[str, ...]:
    """ "500 to 1000", one a time group, the smallest timesteps first."""
    borders = (0.0, *edges, 1000.0)
    return tuple(f"{low:.0f} to {high:.0f}" for low, high in itertools.pairwise(borders))


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _described(info: Any) -> Measurement | None:
    folder = Path(info.folder)
    if not _complete(folder):
        return None
    try:
        about = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        when = str(about.get("created", info.created)).replace("T", " ")[:16]
        count = len(about["prompts"])
        said = (
            f"{when} · {count} {'prompt' if count == 1 else 'prompts'} · {about['steps']} steps · "
            f"guidance {about['guidance']:g} · seed {about['seed']}"
        )
        return Measurement(info.id, info.model, said, float(about.get("seconds", 0.0)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
