"""Looking into a layer: what its input is like before and after the transform, and how it moves over the timesteps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from trdq_core.convert import set_steps
from trdq_core.errors import CalibrationError
from trdq_core.fitting import FittedInput, fit_input
from trdq_core.folders import list_calibrations
from trdq_core.metrics import sqnr_db
from trdq_core.models import listed_name, load_model
from trdq_core.nn.input_grid import InputGrid, range_of
from trdq_core.numerics.affine import choose_qparams, fake_quantize
from trdq_core.plan import LayerInfo, group_inputs
from trdq_core.specs import LayerRule, QuantSpec, Recipe
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeGroups, make_groups

BINS = 101
RANGE_RATIOS = tuple(1 - 0.02 * i for i in range(49))
EIGHT_BITS = QuantSpec(bits=8, symmetric=False, granularity="token", dynamic=True)  # where a recipe has no grid to show
SAMPLE = 200_000  # values a range search looks at


class Facts(NamedTuple):
    """Numbers of one input at the recipe's activation bits. `peak` is absmax over RMS; `clipped_share`: of values that the
    best single range for the whole tensor leaves out; `sqnr_db`: signal over the noise of quantization.
    """

    absmax: float
    kurtosis: float
    clipped_share: float
    sqnr_db: float
    peak: float


class LayerHistograms(NamedTuple):
    """One input before and after its transform on the same edges, in units of each one's RMS; counts over `rows` rows."""

    edges: np.ndarray
    before: np.ndarray
    after: np.ndarray
    before_facts: Facts
    after_facts: Facts
    rows: int
    kept: bool
    note: str


class Timeline(NamedTuple):
    """Channel absmax over time: timesteps (steps,) rising, absmax (steps, channels)."""

    timesteps: np.ndarray
    absmax: np.ndarray


@lru_cache(maxsize=4)
def _statistics(folder: Path) -> Statistics:
    return Statistics.load(folder)


@lru_cache(maxsize=2)
def _weights(model: str) -> tuple[tuple[LayerInfo, ...], dict[str, Tensor]]:
    """The linears of a model and their weights; kept, since a person looks at many layers in a row."""
    adapter = load_model(model)
    layers = adapter.linears()
    weights = {layer.name: adapter.denoiser.get_submodule(layer.name).weight.detach().float().cpu() for layer in layers}
    return layers, weights


def layers(calibration: Path) -> list[str]:
    """The observed inputs, each named by the first linear that reads it, in model order."""
    return list(_statistics(calibration).layers)


def channel_timeline(calibration: Path, layer: str) -> Timeline:
    """How the channel absmax of one input moves over the timesteps."""
    statistics = _statistics(calibration)
    order = np.argsort(statistics.timesteps)
    absmax = statistics.layer(layer).absmax_over_time().numpy()
    return Timeline(np.asarray(statistics.timesteps)[order], absmax[order])


def group_edges(recipe: Recipe, timesteps: Sequence[float], calibration: Path | None = None) -> list[float]:
    """The rising inner edges of a recipe's time groups; those fitted to ranges need the calibration."""
    return list(_groups(recipe, timesteps, calibration).edges)


def group_labels(recipe: Recipe, timesteps: Sequence[float], calibration: Path | None = None) -> list[str]:
    """The time groups in words, group 0 the smallest timesteps; those fitted to ranges need the calibration."""
    return _groups(recipe, timesteps, calibration).labels()


def _groups(recipe: Recipe, timesteps: Sequence[float], calibration: Path | None) -> TimeGroups:
    return make_groups(recipe.time, timesteps) if calibration is None else _statistics(calibration).groups(recipe.time)


def histograms(calibration: Path, model: str, recipe: Recipe, layer: str, group: int) -> LayerHistograms:
    """Histograms of one input in one time group, before and after the transform that `recipe` fits to it."""
    statistics = _statistics(calibration)
    groups = statistics.groups(recipe.time)
    if not 0 <= group < groups.count:
        raise CalibrationError(f"time group: got {group}; this recipe has groups 0 to {groups.count - 1}.")
    rows = statistics.layer(layer).rows_at(statistics.steps_of(groups, group))
    fitted = _fit(calibration, model, recipe, layer)
    if fitted is None:
        facts = _facts(rows, EIGHT_BITS)
        edges, counts, _ = _count(rows, rows)
        return LayerHistograms(
            edges, counts, counts, facts, facts, len(rows), True, "This recipe leaves the layer as it is."
        )
    index = group if len(fitted.transforms) > 1 else 0
    transformed = fitted.transforms[index].apply(rows)
    activation = fitted.group.rule.activation or EIGHT_BITS
    edges, before, after = _count(rows, transformed)
    return LayerHistograms(
        edges,
        before,
        after,
        _facts(rows, activation),
        _facts(transformed, activation),
        len(rows),
        fitted.kept,
        _note(fitted),
    )


def look(
    model: str, recipe: Recipe, *, layer: str | None = None, group: int = 0, calibration: str | None = None
) -> dict[str, Any]:
    """What the Activations page draws, as JSON values: one input before and after its transform, and its channels over time.

    `layer` is one of `layers`, by default the first; `calibration` is a fingerprint or the start of one, by default of the
    model's newest. CalibrationError says what is missing.
    """
    stored = list_calibrations(listed_name(model))
    found = [info for info in stored if info.fingerprint.startswith(calibration or "")]
    if not found:
        which = f" {calibration}" if calibration else ""
        raise CalibrationError(
            f"model {model}: there is no stored calibration{which}; run the calibrate command first."
        )
    folder = found[0].folder
    names = layers(folder)
    chosen = layer or names[0]
    if chosen not in names:
        raise CalibrationError(f"layer: got {chosen!r}; observed were {', '.join(names)}.")
    timeline = channel_timeline(folder, chosen)
    seen = histograms(folder, model, recipe, chosen, group)
    return {
        "model": model, "recipe": recipe.name, "calibration": found[0].fingerprint, "layer": chosen, "group": group,
        "groups": group_labels(recipe, timeline.timesteps, folder), "layers": names, "rows": seen.rows, "kept": seen.kept,
        "note": seen.note, "edges": seen.edges.tolist(), "before": seen.before.tolist(), "after": seen.after.tolist(),
        "before_facts": seen.before_facts._asdict(), "after_facts": seen.after_facts._asdict(),
        "timesteps": timeline.timesteps.tolist(), "channel_absmax": timeline.absmax.tolist(),
    }  # fmt: skip


@lru_cache(maxsize=64)
def _fit(calibration: Path, model: str, recipe: Recipe, layer: str) -> FittedInput | None:
    """The recipe's transform for the linears that read `layer`'s input; without the gate, so that it can be looked at."""
    statistics = _statistics(calibration)
    infos, weights = _weights(model)
    group = next((g for g in group_inputs(infos, recipe) if g.statistics_name == layer), None)
    if group is None:
        return None
    chosen = {info.name: weights[info.name] for info in group.layers}
    group = group._replace(rule=_plain_rounding(group.rule))
    return fit_input(group, chosen, statistics.layer(layer), set_steps(recipe, statistics), do_no_harm=False)


def _plain_rounding(rule: LayerRule) -> LayerRule:
    """The rule with weights rounded to nearest on searched ranges: looking at inputs must not wait for what is learnt."""
    assert rule.weight is not None  # groups only hold quantized layers
    weight = dataclasses.replace(rule.weight, range="mse") if rule.weight.range == "output" else rule.weight
    return dataclasses.replace(rule, weight=weight, rounding="nearest")


def _note(fitted: FittedInput) -> str:
    if not any(fitted.group.rule.chains):
        return "This recipe does not transform inputs."
    gain = 10 * float(np.log10(max(fitted.error_without, 1e-30) / max(fitted.error_with, 1e-30)))
    if fitted.error_with <= fitted.error_without:
        return f"The transform lowers the output error of this input by {gain:.1f} dB on held-out rows; it is kept."
    return f"The transform raises the output error by {-gain:.1f} dB on held-out rows; do-no-harm leaves it out."


def _count(before: Tensor, after: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges and both counts. Each tensor is measured in its own RMS: smoothing changes the unit, only the shape matters."""
    before, after = (x / x.double().square().mean().sqrt().clamp_min(1e-30).float() for x in (before, after))
    top = float(max(before.abs().max(), after.abs().max()))
    edges = np.linspace(-top, top, BINS + 1)
    return edges, *(np.histogram(x.numpy().ravel(), edges)[0] for x in (before, after))


def _facts(rows: Tensor, spec: QuantSpec) -> Facts:
    values = rows.double().flatten()
    centred = values - values.mean()
    variance = centred.square().mean().clamp_min(1e-30)
    grid = InputGrid(spec, (spec.clip,)) if spec.dynamic else InputGrid(spec, ranges=(range_of(rows, spec),))
    return Facts(
        absmax=float(values.abs().max()),
        kurtosis=float(centred.pow(4).mean() / variance.square()),
        clipped_share=_clipped_share(rows, spec.bits),
        sqnr_db=sqnr_db(grid.round(rows), rows),
        peak=float(values.abs().max() / values.square().mean().sqrt().clamp_min(1e-30)),
    )


def _clipped_share(rows: Tensor, bits: int) -> float:
    """The share of values outside the one symmetric range for the whole tensor that rounds it with the least squared error.

    Outliers make that range cut off a tail; a good rotation leaves nothing to cut.
    """
    sample = rows.flatten()[:: max(1, rows.numel() // SAMPLE)]
    top = sample.abs().max().clamp_min(1e-30)
    errors = {}
    for ratio in RANGE_RATIOS:
        grid = choose_qparams(-top * ratio, top * ratio, bits=bits, symmetric=True)
        errors[ratio] = float((fake_quantize(sample, grid, bits=bits) - sample).square().sum())
    best = min(errors, key=errors.__getitem__)
    return float((sample.abs() > top * best).float().mean())
