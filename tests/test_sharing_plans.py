"""Plans from made-up gaps: budgets in operations, time and bytes, reuse across steps, skipping, and what they foretell."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.gaps import Similarity
from trdq_core.sharing import attention_flops
from trdq_core.sharing_plans import (
    attention_share,
    plan_across,
    plan_sharing,
    plan_skipping,
    predict,
    saving_for_time,
    sharing_cells,
    simulate,
    store_bytes_of_block,
    work_saving,
)
from trdq_core.specs import SharingSpec
from trdq_core.timegroups import TimeGroups

NAN = float("nan")
TOKENS, CHANNELS = 64, 128
WHOLE, SAVED = attention_flops(TOKENS, CHANNELS)


def made_up(**changes: Any) -> Similarity:
    """Four steps, three blocks, one head: block 2 never moves, block 0 is alike in both branches, all calm down late."""
    error = torch.tensor([[0.01, 0.30, 0.90], [0.02, 0.25, 0.85], [0.02, 0.05, 0.80], [0.01, 0.04, 0.70]])
    moved = torch.tensor([[NAN] * 3, [0.6, 0.5, 0.0], [0.4, 0.3, 0.01], [0.1, 0.2, 0.02]])
    about = {"tokens": TOKENS, "channels": CHANNELS, "dtype_bytes": 4, "denoiser_flops": 6 * WHOLE}
    measured = {
        "step_error": moved,
        "guidance_change": torch.tensor([NAN, 0.5, 0.4, 1.0]),
        "guidance_share": torch.tensor([1.0, 1.0, 0.5, 0.1]),
    }
    whole = Similarity((900.0, 700.0, 400.0, 100.0), (1 - error)[..., None], error[..., None], error, about, **measured)
    return dataclasses.replace(whole, **changes)


def test_cells_come_in_order_of_their_worst_error() -> None:
    cells = sharing_cells(made_up(), TimeGroups((500.0,)))
    assert [(group, block) for _, group, block in cells] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert [cell.worst for cell in cells] == pytest.approx([0.02, 0.02, 0.05, 0.30, 0.80, 0.90])


def test_a_store_holds_so_many_blocks_of_a_group() -> None:
    of_block = store_bytes_of_block(made_up())
    assert of_block == 2 * TOKENS * CHANNELS * 4
    groups = TimeGroups((500.0,))
    one = plan_sharing(made_up(), groups, saving=1.0, store_bytes=2 * of_block - 1)
    assert one.blocks == ((0,), (0,))
    assert (one.kept_bytes, one.store_bytes) == (of_block, 2 * of_block - 1)
    assert plan_sharing(made_up(), groups, threshold=1.0, store_bytes=0).blocks == ((), ())
    both = plan_across(made_up(), dataclasses.replace(one, store_bytes=2 * of_block), 0.5)
    assert both.kept_bytes == 2 * of_block
    assert both.across_steps == ((2,), (2,))


def test_a_time_budget_goes_by_the_share_of_attention() -> None:
    similarity = made_up()
    assert attention_share(similarity) == pytest.approx(0.5)
    assert saving_for_time(similarity, share=0.05) == pytest.approx(0.1)
    assert saving_for_time(similarity, milliseconds=1.2, step_ms=24.0) == pytest.approx(0.1)
    plan = plan_sharing(similarity, TimeGroups((500.0,)), saving=saving_for_time(similarity, share=0.05))
    assert work_saving(similarity, plan) >= 0.05
    with pytest.raises(RecipeError, match=r"got 6 of 24 ms; sharing in every block saves 0\.125 of a step"):
        saving_for_time(similarity, milliseconds=6.0, step_ms=24.0)
    with pytest.raises(RecipeError, match="give milliseconds or a share"):
        saving_for_time(similarity)
    with pytest.raises(RecipeError, match="need the measured time of a step"):
        saving_for_time(similarity, milliseconds=1.0)
    with pytest.raises(RecipeError, match="give more than 0"):
        saving_for_time(similarity, share=0.0)


def test_blocks_that_stand_still_are_reused_every_second_step() -> None:
    plan = plan_across(made_up(), SharingSpec(edges=(500.0,)), 0.41)
    assert plan.across_steps == ((0, 1, 2), (2,))
    reused = [step.reused for step in simulate(made_up(), plan)]
    assert reused == [(), (2,), (), (0, 1, 2)]
    assert plan.across_saving == pytest.approx(4 / 12)
    assert plan.across_error == pytest.approx((0.0 + 0.1 + 0.2 + 0.02) / 4)
    assert plan.predicted_saving == 0
    assert plan.across_threshold == 0.41


def test_what_is_reused_is_not_shared_and_what_is_skipped_is_neither() -> None:
    spec = SharingSpec(blocks=((0, 1, 2),), across_steps=((0,),), skip_unconditional_below=500.0)
    plan, steps = predict(made_up(), spec), list(simulate(made_up(), spec))
    assert [step.skipped for step in steps] == [False, False, True, True]
    assert [step.shared for step in steps] == [(0, 1, 2), (1, 2), (), ()]
    assert plan.predicted_saving == pytest.approx(5 * SAVED / (12 * WHOLE))
    assert plan.across_saving == pytest.approx((1 + 0.5) / 12), "of a skipped step half of the attention was there"
    assert plan.skipped_saving == pytest.approx(0.25)
    assert work_saving(made_up(), plan) == pytest.approx((plan.predicted_saving + plan.across_saving) / 2 + 0.25)


@pytest.mark.parametrize(
    ("threshold", "below", "saving"), [(0.05, None, None), (0.15, 250.0, 0.125), (0.6, 800.0, 0.375)]
)
def test_skipping_begins_where_the_direction_calms_down(
    threshold: float, below: float | None, saving: float | None
) -> None:
    plan = plan_skipping(made_up(), SharingSpec(), threshold=threshold)
    assert (plan.skip_unconditional_below, plan.skipped_saving) == (below, saving)
    assert plan.active is (below is not None)
    if below is not None:
        assert plan.skipped_change <= threshold


def test_the_first_step_is_computed_unless_guidance_is_off() -> None:
    held = plan_skipping(made_up(), SharingSpec(), below=1000.0)
    off = plan_skipping(made_up(), SharingSpec(), below=1000.0, guidance="off")
    assert (held.skipped_saving, off.skipped_saving) == (0.375, 0.5)
    with pytest.raises(RecipeError, match="give a timestep or a threshold"):
        plan_skipping(made_up(), SharingSpec())


def test_older_measurements_say_what_they_lack() -> None:
    old = made_up(step_error=None, guidance_change=None, about={"tokens": TOKENS, "channels": CHANNELS})
    with pytest.raises(CalibrationError, match="without differences between neighbouring steps; measure it again"):
        plan_across(old, SharingSpec(), 0.1)
    with pytest.raises(CalibrationError, match="without changes of the guidance direction; measure it again"):
        plan_skipping(old, SharingSpec(), threshold=0.1)
    with pytest.raises(CalibrationError, match="without the operations of the denoiser; measure it again"):
        attention_share(old)
    assert plan_skipping(old, SharingSpec(), below=500.0).skipped_change is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"across_steps": [[0]], "edges": [500.0]}, "across_steps: got 1 lists for 2 time groups"),
        ({"across_steps": [[-2]]}, "across_steps: got a negative block number"),
        ({"skip_unconditional_below": 0.0}, "got 0; allowed is a timestep above 0, up to 1000"),
        ({"skip_unconditional_below": 500.0, "skipped_guidance": "on"}, "got 'on'; allowed are 'held', 'off'"),
        ({"target_saving": 1.5}, "sharing saving: got 1.5; give a share above 0"),
        ({"target_step_share": 0.0}, "sharing step share: got 0; give a share above 0"),
        ({"target_psnr_db": 5.0}, "got 5 dB; allowed is 10 to 100"),
        ({"store_bytes": -1}, "store_bytes: got -1; give 0 or more"),
        ({"target_psnr_db": 35.0, "target_saving": 0.1}, "one of the four"),
    ],
)
def test_bad_wishes_are_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        SharingSpec.from_dict(fields)


def test_plans_survive_json() -> None:
    plan = plan_skipping(made_up(), plan_across(made_up(), SharingSpec(blocks=((0,),)), 0.5), threshold=0.15)
    assert SharingSpec.from_json(plan.to_json()) == plan
    assert plan.wished
