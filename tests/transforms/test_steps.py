"""Invariant 34, blocks and prices: what a recipe's steps become on one layer."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import ShapeError
from trdq_core.specs import TransformSpec
from trdq_core.transforms.fit import fit_transform
from trdq_core.transforms.steps import input_rms, price, resolve_adaptive, step_blocks

SMOOTH, ADAPTIVE = TransformSpec(kind="smooth", alpha=0.5), TransformSpec(kind="adaptive_rotation")
SERPENTINE, HADAMARD = TransformSpec(kind="serpentine"), TransformSpec(kind="hadamard")
GREEDY = TransformSpec(kind="greedy_rotation")


def kinds(specs: tuple[TransformSpec, ...]) -> list[str]:
    return [spec.kind for spec in specs]


def test_invariant_34_the_rms_of_a_unit_gaussian_is_one_whatever_the_order() -> None:
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert input_rms(rows) == pytest.approx(1, abs=0.01)
    assert input_rms(rows[torch.randperm(4096)]) == pytest.approx(input_rms(rows), rel=1e-12)
    assert input_rms(-3 * rows) == pytest.approx(3 * input_rms(rows), rel=1e-12)


@pytest.mark.parametrize("threshold", [1.0, 0.25])
def test_invariant_34_the_rotation_changes_at_the_threshold(threshold: float) -> None:
    spec = TransformSpec(kind="adaptive_rotation", threshold=threshold)
    signs = (torch.randint(0, 2, (64, 128)) * 2 - 1).double()  # their RMS is 1 to the last bit
    calm = resolve_adaptive((SMOOTH, spec), signs * threshold * (1 - 1e-9))
    rough = resolve_adaptive((SMOOTH, spec), signs * threshold)
    assert kinds(calm) == ["smooth", "hadamard"]
    assert kinds(rough) == ["smooth", "greedy_rotation", "serpentine", "greedy_rotation"]


def test_invariant_34_the_rms_is_taken_before_smoothing() -> None:
    rows, weight = 5 * torch.randn(64, 128), torch.randn(512, 128)
    absmax = rows.abs().amax(0)
    words = [
        fit_transform((SMOOTH, ADAPTIVE), rows=x, absmax=absmax, weights=[weight], seed=0).describe()
        for x in (rows, rows / 50)
    ]
    assert words == ["scale, R32, permute, R32", "scale, H128"]


def test_options_of_an_adaptive_rotation_reach_its_choice() -> None:
    spec = TransformSpec(kind="adaptive_rotation", block=32, steps=9, random_signs=True)
    (calm,) = resolve_adaptive((spec,), torch.zeros(4, 64))
    assert (calm.block, calm.random_signs) == (32, True)
    first, permutation, second = resolve_adaptive((spec,), torch.ones(4, 64))
    assert first == second and (first.block, first.steps, first.random_signs) == (32, 9, False)
    assert permutation.block == 32
    assert resolve_adaptive((SMOOTH, HADAMARD), torch.ones(4, 64)) == (SMOOTH, HADAMARD)


@pytest.mark.parametrize(
    ("specs", "channels", "blocks"),
    [
        ((SMOOTH, HADAMARD), 1152, [0, 128]),
        ((SERPENTINE, HADAMARD), 256, [128, 128]),  # 256 only where it is asked for
        ((SERPENTINE, TransformSpec(kind="hadamard", block=256)), 512, [256, 256]),
        ((TransformSpec(kind="serpentine", block=64), HADAMARD), 512, [64, 128]),
        ((SERPENTINE, HADAMARD), 2240, [64, 64]),
        ((GREEDY, SERPENTINE, GREEDY), 1152, [128, 128, 128]),
        ((GREEDY, SERPENTINE, HADAMARD, GREEDY), 128, [32, 128, 128, 32]),  # only dense ones are kept small
        ((SERPENTINE,), 48, [16]),
    ],
)
def test_blocks_are_the_largest_that_pay(specs: tuple[TransformSpec, ...], channels: int, blocks: list[int]) -> None:
    assert step_blocks(specs, channels, 4 * channels) == blocks


def test_invariant_09_hadamard_blocks_that_no_kernel_runs_are_refused_by_name() -> None:
    with pytest.raises(
        ShapeError, match="ff: 48 channels do not split into Hadamard blocks of 32 to 256; leave hadamard"
    ):
        step_blocks((HADAMARD,), 48, 48, layer="ff")
    with pytest.raises(ShapeError, match="ff: 48 channels do not split .* leave adaptive_rotation out for it"):
        price((TransformSpec(kind="adaptive_rotation"),), 48, 48, layer="ff")
    wide = TransformSpec(kind="hadamard", block=512)
    with pytest.raises(ShapeError, match="ff: got a Hadamard block of 512, .* for 1024 channels use 32, 64, 128, 256"):
        step_blocks((wide,), 1024, 1024, layer="ff")
    with pytest.raises(ShapeError, match="ff: block=256 does not divide 384 channels"):
        step_blocks((TransformSpec(kind="hadamard", block=256),), 384, 384, layer="ff")


@pytest.mark.parametrize(
    "specs",
    [
        (SMOOTH,),
        (SMOOTH, GREEDY, SERPENTINE, GREEDY),
        (SMOOTH, SERPENTINE, HADAMARD),
        (TransformSpec(kind="hadamard", random_signs=True),),
        (SMOOTH, SERPENTINE, TransformSpec(kind="hadamard", random_signs=True)),
        (SMOOTH, GREEDY, TransformSpec(kind="hadamard", block=32, random_signs=True), GREEDY),
        (),
    ],
)
def test_the_price_foretells_bytes_and_words(specs: tuple[TransformSpec, ...]) -> None:
    rows, weight = torch.randn(64, 128), torch.randn(512, 128)
    fitted = fit_transform(specs, rows=rows, absmax=rows.abs().amax(0), weights=[weight], seed=0)
    assert price(specs, 128, 512) == (fitted.nbytes, fitted.describe())


def test_an_adaptive_rotation_is_priced_at_its_dearer_choice() -> None:
    rough = price((SMOOTH, GREEDY, SERPENTINE, GREEDY), 128, 512)
    assert price((SMOOTH, ADAPTIVE), 128, 512) == (rough.nbytes, "scale, H128 or scale, R32, permute, R32")
