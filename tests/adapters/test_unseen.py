"""A family that no table knows: everything is found from structure and by looking at a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adapters.unseen import unseen_embeddings, unseen_pipeline
from trdq_core.adapters.generic import TransformerModel
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.plan import make_plan
from trdq_core.presets import parse_recipe
from trdq_core.sampling import sample
from trdq_core.timegroups import TimeArgument, TimeContext, TimeGroups

ROLES = {
    "mixer.query": "self_q", "mixer.key": "self_k", "mixer.value": "self_v", "mixer.merge": "self_out",
    "mlp.up": "mlp_in", "mlp.gate": "mlp_in", "mlp.down": "mlp_out", "adaln_modulation": "modulation",
    "router": "other", "unused": "uncalled",
}  # fmt: skip


@pytest.fixture
def model() -> TransformerModel:
    model = TransformerModel.of(unseen_pipeline(), "unseen")
    model.provide("apple", unseen_embeddings())
    return model


def test_roles_and_shared_inputs_are_found(model: TransformerModel) -> None:
    layers = {layer.name: layer for layer in model.linears()}
    for leaf, role in ROLES.items():
        assert layers[f"stages.1.{leaf}"].role == role
    assert [layers[name].role for name in ("patchify", "text_in", "time_mlp.0", "head")] == ["embed"] * 3 + ["final"]
    assert {layers[f"stages.0.mixer.{part}"].leader for part in ("query", "key", "value")} == {"stages.0.mixer.query"}
    assert layers["stages.0.mlp.gate"].leader == "stages.0.mlp.up"
    assert layers["stages.1.mixer.query"].leader == "stages.1.mixer.query"


def test_the_plan_says_what_could_not_be_placed(model: TransformerModel) -> None:
    plan = make_plan(model.linears(), parse_recipe("rtn-w8a8"), backend="reference")
    reasons = {row.layer: row.reason for row in plan.layers if row.action == "keep"}
    assert "role could not be told" in reasons["stages.0.router"]
    assert "never calls it" in reasons["stages.0.unused"]
    assert "stages.0.mixer.query" not in reasons


def test_time_and_guidance_are_found_from_a_run(model: TransformerModel) -> None:
    assert model.timestep_argument == TimeArgument("sigma", 2, 1000.0)
    assert model.guidance_layout == "joint_reversed"
    time, seen = TimeContext(TimeGroups((500.0,))), []
    handle = time.attach(model.denoiser, model.timestep_argument)
    run = sample(
        model, model.encode(["apple"])[0], 0, steps=4, guidance=3.0, on_step=lambda *_: seen.append(time.timestep)
    )
    handle.remove()
    assert seen == pytest.approx(run.timesteps)


def test_equal_embeddings_of_both_branches_hide_nothing(model: TransformerModel) -> None:
    same = unseen_embeddings()["prompt_embeds"]
    model.provide("apple", {"prompt_embeds": same, "negative_prompt_embeds": same.clone()})
    assert model.guidance_layout == "joint_reversed"


def test_it_is_calibrated_converted_and_sampled(model: TransformerModel, tmp_path: Path) -> None:
    statistics = calibrate(model, ["apple"], steps=2, guidance=3.0, seed=0)
    changed = convert(
        model.denoiser, model.linears(), parse_recipe("tr-dq-w4a8", groups=2), statistics,
        backend="reference", storage_folder=tmp_path, argument=model.timestep_argument,
    )  # fmt: skip
    assert set(changed.quantized_layers()) == {
        f"stages.{stage}.{leaf}"
        for stage in (0, 1)
        for leaf, role in ROLES.items()
        if role not in ("modulation", "other", "uncalled")
    }
    conditioning = model.encode(["apple"])[0]
    reference = sample(model, conditioning, 0, steps=2, guidance=3.0).latents[-1]
    with model.using(changed.denoiser):
        run = sample(model, conditioning, 0, steps=2, guidance=3.0).latents[-1]
    assert torch.isfinite(run).all()
    assert 0 < (run - reference).norm() < 0.25 * (reference - model.initial_latents(0)).norm()
