"""The search for the most sharing that keeps a PSNR: the bisection alone, on a model, and what a wish comes to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from trdq_core import auto_sharing as module
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.auto_sharing import PictureJudge, auto_sharing, bisect_largest, fulfil
from trdq_core.errors import CalibrationError, Cancelled, RecipeError
from trdq_core.gaps import Similarity
from trdq_core.similarity import measure_similarity
from trdq_core.specs import SharingSpec
from trdq_core.timegroups import TimeGroups

STEPS = 3
PROMPTS = ["red apple", "tiger face", "rocket"]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def similarity(model: PixArtModel) -> Similarity:
    return measure_similarity(model, PROMPTS[:1], steps=STEPS, guidance=3.5, seed=0)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_the_bisection_finds_the_border(count: int) -> None:
    for border in range(count + 1):
        tried: list[int] = []

        def passes(number: int, border: int = border, tried: list[int] = tried) -> bool:
            tried.append(number)
            return number <= border

        assert bisect_largest(count, passes) == border
        assert len(tried) <= math.ceil(math.log2(count + 1)) + 1


def test_without_a_border_the_bisection_ends_at_what_was_tried() -> None:
    passing = {0, 1, 4, 6}
    found = bisect_largest(8, lambda number: number in passing)
    assert found in passing


def fake(monkeypatch: pytest.MonkeyPatch, psnrs: dict[tuple[int, int], float]) -> None:
    """PSNR by (shared cells, prompt) instead of pictures."""

    def psnr(self: PictureJudge, spec: SharingSpec, index: int) -> float:
        return psnrs[sum(map(len, spec.blocks)), index]

    monkeypatch.setattr(PictureJudge, "psnr", psnr)


def test_the_lowest_prompt_decides_and_the_end_is_verified(
    model: PixArtModel, similarity: Similarity, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"prompts": PROMPTS, "target_db": 35.0, "margin_db": 1.0}
    groups = TimeGroups((500.0,))  # four cells
    # Prompts 0 and 1 are searched on: three cells hold there. Prompt 2 only holds with one.
    low = {(n, p): 40.0 for n in range(1, 4) for p in range(2)} | {(4, 0): 40.0, (4, 1): 35.5}
    fake(monkeypatch, {**low, (3, 2): 35.9, (2, 2): 20.0, (1, 2): 36.0})
    plan = auto_sharing(model, similarity, groups, **settings)
    assert sum(map(len, plan.blocks)) == 1
    assert (plan.measured_psnr_db, plan.measured_prompts, plan.target_psnr_db) == (36.0, 3, 35.0)
    assert plan.predicted_saving == pytest.approx(plan.predicted_saving)
    fake(monkeypatch, {(n, p): 10.0 for n in range(1, 5) for p in range(3)})
    nothing = auto_sharing(model, similarity, groups, **settings)
    assert (nothing.active, nothing.measured_psnr_db, nothing.measured_prompts) == (False, None, None)


def test_a_model_is_searched_with_its_pictures(model: PixArtModel, similarity: Similarity) -> None:
    events: list[dict] = []
    plan = auto_sharing(
        model, similarity, TimeGroups(), target_db=30.0, margin_db=0.0, prompts=PROMPTS[:2], on_event=events.append
    )
    # Block 0 is exactly free in this model; whether block 1 is shared is up to the pictures.
    assert 0 in plan.blocks[0]
    judge = PictureJudge(model, PROMPTS[:2], steps=STEPS, guidance=3.5, seed=0)
    lowest = judge.lowest(SharingSpec(blocks=plan.blocks))
    assert lowest >= 30.0
    assert plan.measured_psnr_db == (pytest.approx(lowest, abs=1e-3) if math.isfinite(lowest) else None)
    assert events[-1]["stage"] == "search"
    assert not model.denoiser._forward_pre_hooks
    again = auto_sharing(model, similarity, TimeGroups(), target_db=30.0, margin_db=0.0, prompts=PROMPTS[:2])
    assert again == plan
    assert auto_sharing(model, similarity, TimeGroups(), prompts=PROMPTS[:1], store_bytes=0).blocks == ((),)


def test_bad_searches_are_refused_and_can_be_cancelled(model: PixArtModel, similarity: Similarity) -> None:
    with pytest.raises(RecipeError, match="there are no prompts"):
        auto_sharing(model, similarity, TimeGroups(), prompts=[])
    with pytest.raises(RecipeError, match="got a margin of -1 dB"):
        auto_sharing(model, similarity, TimeGroups(), prompts=PROMPTS, margin_db=-1.0)
    with pytest.raises(Cancelled):
        auto_sharing(model, similarity, TimeGroups(), prompts=PROMPTS, cancelled=lambda: True)


def test_a_wish_comes_to_a_plan(model: PixArtModel, similarity: Similarity) -> None:
    def plan(**wish: object) -> SharingSpec:
        return fulfil(model, similarity, SharingSpec(**wish), prompts=PROMPTS[:1])

    assert plan(measure="output_error", threshold=10.0).blocks == ((0, 1),)
    assert plan(target_saving=0.2).predicted_saving >= 0.2
    stepwise = plan(target_step_share=1e-4)
    assert (stepwise.blocks, stepwise.target_step_share, stepwise.target_saving) == (((0,),), 1e-4, None)
    assert plan(target_saving=0.25, store_bytes=0).blocks == ((),)
    late = plan(across_threshold=100.0, skip_unconditional_below=500.0, skipped_guidance="off")
    assert late.across_steps == ((0, 1),)
    assert (late.skip_unconditional_below, late.skipped_guidance) == (500.0, "off")
    assert plan(skip_threshold=100.0).skipped_saving == pytest.approx((STEPS - 1) / (2 * STEPS))


def test_a_psnr_is_kept_by_the_whole_plan(
    model: PixArtModel, similarity: Similarity, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = SharingSpec(target_psnr_db=30.0, across_threshold=100.0)
    monkeypatch.setattr(module, "auto_sharing", lambda *a, **k: SharingSpec(target_psnr_db=30.0))
    monkeypatch.setattr(PictureJudge, "psnr", lambda self, spec, index: 33.0 - index)
    found = fulfil(model, similarity, wish, prompts=PROMPTS)
    assert (found.measured_psnr_db, found.measured_prompts) == (31.0, 3)
    monkeypatch.setattr(PictureJudge, "psnr", lambda self, spec, index: 31.0 - index)
    with pytest.raises(CalibrationError, match=r"lowest of 3 prompts is 29\.0 dB, asked were 30; lower"):
        fulfil(model, similarity, wish, prompts=PROMPTS)


def test_guidance_is_that_of_the_measurement(model: PixArtModel, similarity: Similarity) -> None:
    judge = PictureJudge(model, PROMPTS[:1], steps=STEPS, guidance=3.5, seed=0)
    assert judge.psnr(SharingSpec(), 0) == math.inf
    spec = SharingSpec(skip_unconditional_below=1000.0, skipped_guidance="off")
    assert judge.psnr(spec, 0) < 60
    assert judge.psnr(spec, 0) == judge.psnr(dataclasses.replace(spec), 0)
    assert torch.isnan(similarity.step_error[0]).all()
