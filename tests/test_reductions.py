"""Invariant 33: methods that are said to contain each other do. Each is written out by hand once and met bit for bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.outliers import heavy_tailed_weight, outlier_rows
from trdq_core.fitting import FittedInput, fit_input, split_rows
from trdq_core.numerics.hadamard import rotate_blocks
from trdq_core.plan import InputGroup, LayerInfo
from trdq_core.presets import make_recipe
from trdq_core.specs import LayerRule, QuantSpec, TransformSpec
from trdq_core.statistics import LayerStatistics
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.fit import fit_transform
from trdq_core.transforms.rotation import greedy_rotation, serpentine_permutation
from trdq_core.weights.rounding import QuantizedWeight, quantize_weight

CHANNELS, OUT, BLOCK, SEED = 256, 96, 32, 3
WEIGHT = QuantSpec(bits=4, symmetric=False)


@pytest.fixture(scope="module")
def statistics() -> LayerStatistics:
    """Two timesteps of two items each, their ranges from rows with outliers."""
    rows = torch.stack([outlier_rows(128, CHANNELS, 6, seed) for seed in (1, 2)])
    return LayerStatistics(rows.unflatten(1, (2, 64)).abs().amax(2).half(), rows.half())


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return heavy_tailed_weight(OUT, CHANNELS)


def fit(rule: LayerRule, statistics: LayerStatistics, weight: Tensor) -> FittedInput:
    """`rule` fitted for one set over all timesteps, K = 1, without the do-no-harm check."""
    layer = LayerInfo("ff", "mlp_in", "ff", CHANNELS, OUT)
    return fit_input(
        InputGroup("ff", (layer,), rule), {"ff": weight}, statistics, [[0, 1]], do_no_harm=False, seed=SEED
    )


def fit_rows(statistics: LayerStatistics) -> Tensor:
    """The rows that a fit over all timesteps looks at; the others are held out."""
    return split_rows(statistics, [0, 1]).fit


def only(rule: LayerRule, *kinds: str) -> LayerRule:
    """`rule` with the transform steps of these kinds alone, in blocks of one size."""
    kept = [dataclasses.replace(t, block=BLOCK) for t in rule.transforms if t.kind in kinds]
    return dataclasses.replace(rule, transforms=tuple(kept))


def assert_same(fitted: FittedInput, transform: InputTransform, quantized: QuantizedWeight) -> None:
    """The one set of `fitted` is this transform and these integers, to the last bit."""
    pairs = [*zip(fitted.transforms[0], transform, strict=True), *zip(fitted.weights["ff"][0], quantized, strict=True)]
    for got, expected in pairs:
        assert torch.equal(got, expected) if isinstance(expected, Tensor) else got == expected


def test_invariant_33_tr_dq_without_rotation_is_the_first_vidit_q(statistics: LayerStatistics, weight: Tensor) -> None:
    """One time range: d = a^0.11 / w^0.89 with a the moving average over items, then per-channel rounding to nearest."""
    rule = only(make_recipe("tr-dq", weight_bits=4, activation_bits=8).rules[0], "smooth")
    average = statistics.item_absmax[0, 0].float()
    for item in statistics.item_absmax.float().flatten(0, 1)[1:]:
        average = rule.transforms[0].momentum * average + (1 - rule.transforms[0].momentum) * item
    scale = average.double().clamp_min(1e-5) ** 0.11 / weight.double().abs().amax(0) ** 0.89
    transform = InputTransform(inverse_scale=(1 / scale).float())
    weight_by_hand = weight.double() / transform.inverse_scale.double()
    assert_same(fit(rule, statistics, weight), transform, quantize_weight(weight_by_hand, WEIGHT))


def test_invariant_33_tr_dq_without_scale_is_duquant_without_smoothing(
    statistics: LayerStatistics, weight: Tensor
) -> None:
    """Greedy rotation, serpentine permutation, greedy rotation; no clipping."""
    rule = only(make_recipe("tr-dq", weight_bits=4, activation_bits=4).rules[0], "greedy_rotation", "serpentine")
    generator, rows = torch.Generator().manual_seed(SEED), fit_rows(statistics)
    first = greedy_rotation(rows, BLOCK, 256, generator).half()
    rows = rotate_blocks(rows, first)
    permutation = serpentine_permutation(rows.abs().amax(0), BLOCK)
    second = greedy_rotation(rows[:, permutation.long()], BLOCK, 256, generator).half()
    by_hand = rotate_blocks(weight.double(), torch.linalg.inv(first.double()).T)[:, permutation.long()]
    by_hand = rotate_blocks(by_hand, torch.linalg.inv(second.double()).T)
    transform = InputTransform(rotation=first, permutation=permutation, second_rotation=second)
    assert_same(fit(rule, statistics, weight), transform, quantize_weight(by_hand, WEIGHT))


@pytest.mark.parametrize(
    ("threshold", "rotations"),
    [
        (math.inf, (TransformSpec(kind="hadamard", random_signs=True),)),
        (0.0, tuple(TransformSpec(kind=kind) for kind in ("greedy_rotation", "serpentine", "greedy_rotation"))),
    ],
    ids=["quarot", "duquant"],
)
def test_invariant_33_lrq_dit_at_the_ends_of_its_threshold(
    statistics: LayerStatistics, weight: Tensor, threshold: float, rotations: tuple[TransformSpec, ...]
) -> None:
    """With uniform weights it is SmoothQuant and QuaRot where every input is calm, SmoothQuant and DuQuant where none is."""
    smooth = TransformSpec(kind="smooth", alpha=0.5)
    adaptive = TransformSpec(kind="adaptive_rotation", threshold=threshold, random_signs=True)
    rows = fit_rows(statistics)
    arguments = {"rows": rows, "absmax": rows.abs().amax(0), "weights": [weight], "seed": SEED}
    got, expected = (fit_transform((smooth, *rest), **arguments) for rest in ((adaptive,), rotations))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    assert not torch.equal(got.apply(rows), rows)


def test_invariant_33_tfmq_dm_with_one_group_is_static_rounding(statistics: LayerStatistics, weight: Tensor) -> None:
    """Ranges for each time group, K = 1: one static range; the rounding of the weights is the same rule in both."""
    static = make_recipe("rtn-static", weight_bits=4, activation_bits=8).rules[0]
    assert static.activation is not None
    grouped = dataclasses.replace(static, activation=dataclasses.replace(static.activation, per_time_group=True))
    first, second = fit(static, statistics, weight), fit(grouped, statistics, weight)
    assert_same(first, second.transforms[0], second.weights["ff"][0])
    assert first.error_with == second.error_with
    assert_same(first, InputTransform(), quantize_weight(weight, WEIGHT))
