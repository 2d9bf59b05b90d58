"""The gap between the guidance branches: against whole maps, in both call styles, on disk, and plans made from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from trdq_core import branches
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.errors import CalibrationError, Cancelled, RecipeError
from trdq_core.nn import attention
from trdq_core.nn.attention import Map
from trdq_core.nn.modules import share_copy
from trdq_core.sampling import sample
from trdq_core.similarity import FILES, MeasuringAttention, Similarity, measure_gap, measure_similarity, plan_sharing
from trdq_core.timegroups import TimeContext, TimeGroups

STEPS = 4


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def similarity(model: PixArtModel) -> Similarity:
    return measure_similarity(model, ["red apple", "tiger face"], steps=STEPS, guidance=3.5, seed=0)


@pytest.mark.parametrize("budget", [1 << 9, 1 << 20])
def test_the_gap_is_that_of_whole_maps(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(attention, "SCORE_BYTES", budget)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 3, 50, 16)  # branch, items, heads, tokens, width
    gap = measure_gap(Map(q[1], k[1], None), Map(q[0], k[0], None), v[0])
    maps = (q @ k.transpose(-1, -2) / 4).softmax(-1).double()
    own, other = (maps[i].transpose(0, 1).flatten(1) for i in (1, 0))
    cosine = torch.nn.functional.cosine_similarity(own, other)
    assert torch.allclose(gap.map_cosine(), cosine, atol=1e-6)
    a, b = maps[1] @ v[0].double(), maps[0] @ v[0].double()
    expected = [(a - b)[:, head].norm() / b[:, head].norm() for head in range(3)]
    assert torch.allclose(gap.output_error(), torch.stack(expected), rtol=1e-5)
    assert float(gap.block_error()) == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-5)


def test_the_measured_shapes_and_ranges(model: PixArtModel, similarity: Similarity) -> None:
    assert similarity.map_cosine.shape == similarity.output_error.shape == (STEPS, 2, 2)
    assert similarity.block_error.shape == (STEPS, 2)
    assert ((similarity.map_cosine > 0) & (similarity.map_cosine <= 1 + 1e-6)).all()
    assert (similarity.output_error[:, 1] > 0).all()
    # The prompt enters in the cross-attention of the first block: before it both branches hold the same tensor.
    assert (similarity.output_error[:, 0] == 0).all()
    assert (similarity.about["tokens"], similarity.about["channels"]) == (16, 128)
    plain = sample(model, model.encode(["red apple"])[0], 0, steps=STEPS, guidance=3.5)
    assert len(plain.timesteps) == len(similarity.timesteps)
    assert not model.denoiser._forward_pre_hooks, "the measured denoiser was a copy"


def test_one_batch_and_two_calls_in_either_order_measure_the_same(model: PixArtModel) -> None:
    module = model.denoiser.transformer_blocks[0].attn1
    torch.manual_seed(0)
    x = torch.randn(4, 16, 128)
    gaps = []
    with torch.no_grad():
        for order in ((), ("conditional", "unconditional"), ("unconditional", "conditional")):
            measuring = MeasuringAttention(module.processor, TimeContext(TimeGroups()))
            if not order:
                with branches.joint():
                    assert torch.equal(measuring(module, x), module.processor(module, x))
            with branches.two_calls() as step:
                for branch in order:
                    with step.call(branch):
                        measuring(module, x[2:] if branch == "conditional" else x[:2])
            (gap,) = measuring.seen[0.0]
            gaps.append(torch.stack([gap.map_cosine(), gap.output_error()]))
            assert not step.kept
    assert torch.allclose(gaps[0], gaps[1], rtol=1e-4)
    assert torch.allclose(gaps[1], gaps[2])


def test_similarity_survives_the_disk(similarity: Similarity, tmp_path: Path) -> None:
    similarity.save(tmp_path)
    again = Similarity.load(tmp_path)
    assert again.timesteps == similarity.timesteps
    assert torch.equal(again.output_error, similarity.output_error)
    assert plan_sharing(again, TimeGroups(), threshold=0.5) == plan_sharing(similarity, TimeGroups(), threshold=0.5)
    for name in ("step_error", "guidance_change", "guidance_share"):
        assert torch.equal(getattr(again, name).nan_to_num(-1), getattr(similarity, name).nan_to_num(-1))
    (tmp_path / FILES[0]).write_bytes(b"x")
    with pytest.raises(CalibrationError, match="damaged .* measure it again"):
        Similarity.load(tmp_path)


def test_files_of_format_one_are_read_without_what_they_lack(similarity: Similarity, tmp_path: Path) -> None:
    old = dataclasses.replace(similarity, step_error=None, guidance_change=None, guidance_share=None)
    old.save(tmp_path)
    about = json.loads((tmp_path / FILES[1]).read_text())
    (tmp_path / FILES[1]).write_text(json.dumps(about | {"format_version": 1}))
    again = Similarity.load(tmp_path)
    assert again.step_error is None
    assert torch.equal(again.block_error, similarity.block_error)
    (tmp_path / FILES[1]).write_text(json.dumps(about | {"format_version": 99}))
    with pytest.raises(CalibrationError, match="format 99 is newer than 2, update"):
        Similarity.load(tmp_path)


def test_steps_are_compared_with_the_one_before(model: PixArtModel) -> None:
    found = measure_similarity(model, ["red apple"], steps=3, guidance=3.5, seed=0)
    predictions, outputs, copy = [], [], share_copy(model.denoiser)
    copy.register_forward_hook(lambda module, args, output: predictions.append(output[0]))
    copy.transformer_blocks[1].attn1.register_forward_hook(lambda module, args, output: outputs.append(output))
    with model.using(copy):
        sample(model, model.encode(["red apple"])[0], 0, steps=3, guidance=3.5)
    directions = [p[1:, :4] - p[:1, :4] for p in predictions]
    assert torch.isnan(found.step_error[0]).all()
    assert torch.isnan(found.guidance_change[0])
    for i in (1, 2):
        moved = (outputs[i] - outputs[i - 1]).norm() / outputs[i].norm()
        assert float(found.step_error[i, 1]) == pytest.approx(float(moved), rel=1e-4)
        change = (directions[i] - directions[i - 1]).norm() / directions[i].norm()
        assert float(found.guidance_change[i]) == pytest.approx(float(change), rel=1e-4)
        share = directions[i].norm() / predictions[i][1:, :4].norm()
        assert float(found.guidance_share[i]) == pytest.approx(float(share), rel=1e-4)


def made_up() -> Similarity:
    """Two steps, three blocks, one head: block 1 is alike at the late step only, block 2 never."""
    error = torch.tensor([[0.01, 0.30, 0.90], [0.02, 0.05, 0.80]])
    about = {"tokens": 64, "channels": 128}
    return Similarity((800.0, 200.0), (1 - error)[..., None], error[..., None], error, about)


def test_a_threshold_must_hold_at_every_step_of_a_group() -> None:
    whole = plan_sharing(made_up(), TimeGroups(), threshold=0.1)
    assert whole.blocks == ((0,),)
    assert whole.predicted_saving == pytest.approx(0.25 / 3)
    assert whole.predicted_error == pytest.approx(0.015)
    cut = plan_sharing(made_up(), TimeGroups((500.0,)), threshold=0.1)
    assert cut.blocks == ((0, 1), (0,))
    assert cut.worst_error == pytest.approx(0.05)
    assert plan_sharing(made_up(), TimeGroups((500.0,)), threshold=0.9, measure="map_cosine").blocks == cut.blocks
    nothing = plan_sharing(made_up(), TimeGroups(), threshold=0.001)
    assert not nothing.active
    assert nothing.predicted_saving == 0


def test_a_budget_takes_the_least_errors_first() -> None:
    assert plan_sharing(made_up(), TimeGroups((500.0,)), saving=0.25 / 3).blocks == ((0,), (0,))
    assert plan_sharing(made_up(), TimeGroups((500.0,)), saving=0.1).blocks == ((0, 1), (0,))
    assert plan_sharing(made_up(), TimeGroups(), saving=1.0).predicted_saving == pytest.approx(0.25)
    with pytest.raises(RecipeError, match="give a threshold or a saving"):
        plan_sharing(made_up(), TimeGroups())


def test_measuring_needs_two_branches_and_can_be_cancelled(model: PixArtModel) -> None:
    with pytest.raises(CalibrationError, match="a guidance above 1"):
        measure_similarity(model, ["red apple"], steps=2, guidance=1.0, seed=0)
    with pytest.raises(Cancelled):
        measure_similarity(model, ["red apple"], steps=2, guidance=2.0, seed=0, cancelled=lambda: True)
    assert branches.present().branch == "single"
