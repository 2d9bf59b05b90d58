"""A Latte folder as a model: clips in place of pictures, temporal blocks with roles of their own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from trdq_core import models
from trdq_core.adapters import latte, layers_of, load_adapter, pixart
from trdq_core.adapters.latte import LatteModel, layers_from_config
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.errors import ModelError, ShapeError
from trdq_core.metrics import compare_clips
from trdq_core.presets import parse_recipe
from trdq_core.sampling import sample
from trdq_core.timegroups import TimeContext, TimeGroups

TEMPORAL = tuple(f"temporal_{part}" for part in ("q", "k", "v", "out", "mlp_in", "mlp_out"))
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FRAMES = 4


@pytest.fixture(scope="module")
def model(tiny_video_folder: Path) -> LatteModel:
    return LatteModel(tiny_video_folder)


def test_folders_are_told_apart_by_their_pipeline(tiny_video_folder: Path, tiny_folder: Path) -> None:
    assert isinstance(load_adapter(str(tiny_video_folder), tiny_video_folder), latte.LatteModel)
    assert isinstance(load_adapter("small", tiny_folder), pixart.PixArtModel)
    assert layers_of("small", tiny_video_folder) == layers_from_config(tiny_video_folder)
    assert layers_of("small", tiny_folder) == pixart.layers_from_config(tiny_folder)


def test_other_pipelines_and_missing_folders_get_one_sentence(tiny_video_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_video_folder, tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "MadeUpPipeline"}))
    with pytest.raises(ModelError, match="its pipeline MadeUpPipeline is not one of diffusers"):
        load_adapter("model", copy)
    with pytest.raises(ModelError, match="there is no folder nowhere"):
        load_adapter("nowhere", tmp_path / "nowhere")


def test_roles_tell_space_from_time(model: LatteModel, tiny_video_folder: Path, tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in model.linears()}
    roles = Counter(layer.role for layer in layers.values())
    assert "other" not in roles
    assert [roles[role] for role in TEMPORAL] == [2] * 6
    assert roles["self_q"] == roles["cross_q"] == roles["mlp_in"] == 2
    leader = "temporal_transformer_blocks.1.attn1.to_q"
    assert layers["temporal_transformer_blocks.1.attn1.to_v"].leader == leader
    copy = shutil.copytree(tiny_video_folder, tmp_path / "model")
    (copy / WEIGHTS).unlink()
    assert layers_from_config(copy) == model.linears()


def test_the_same_seed_gives_the_same_clip_and_callbacks_see_every_step(model: LatteModel) -> None:
    conditioning = model.encode(["red apple"])[0]
    assert [t.shape[1] for t in conditioning.tensors.values()] == [3, 3]  # two words and the end, both branches
    runs = [sample(model, conditioning, 3, steps=3, guidance=3.5) for _ in range(2)]
    assert len(runs[0].latents) == 3 and runs[0].latents[0].shape == (1, 4, FRAMES, 8, 8)
    assert runs[0].timesteps == sorted(runs[0].timesteps, reverse=True)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].latents, runs[1].latents, strict=True))
    other = sample(model, conditioning, 4, steps=3, guidance=3.5)
    assert not torch.equal(other.latents[-1], runs[0].latents[-1])


def test_it_samples_what_the_stock_pipeline_samples(model: LatteModel) -> None:
    ours = sample(model, model.encode(["green salad"])[0], 7, steps=3, guidance=3.0)
    stock = model.pipeline(
        "green salad", num_inference_steps=3, guidance_scale=3.0, video_length=FRAMES, height=16, width=16,
        clean_caption=False, generator=torch.Generator().manual_seed(7), output_type="np",
    ).frames[0]  # fmt: skip
    frames = model.decode(ours.latents[-1])
    assert frames.shape == (FRAMES, 16, 16, 3) and frames.dtype == np.uint8
    assert np.abs(frames / 255 - stock).max() <= 0.5 / 255 + 1e-5


def test_decoding_in_chunks_changes_nothing(model: LatteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = model.initial_latents(0)
    whole = model.decode(latents)
    monkeypatch.setattr(latte, "FRAMES_AT_ONCE", 3)
    again = model.decode(latents)
    assert np.abs(whole.astype(int) - again).max() <= 1  # another batch size, another order of summation
    assert len({frame.tobytes() for frame in whole}) == FRAMES


def test_time_is_read_from_the_first_of_repeated_timesteps(model: LatteModel) -> None:
    time, seen = TimeContext(TimeGroups((500.0,))), []
    handle = time.attach(model.denoiser, model.timestep_argument)
    run = sample(
        model, model.encode(["tiger"])[0], 0, steps=4, guidance=3.0,
        on_step=lambda step, timestep, latents: seen.append((time.timestep, time.group)),
    )  # fmt: skip
    handle.remove()
    assert [timestep for timestep, _ in seen] == run.timesteps
    assert seen[0][1] == 1 and seen[-1][1] == 0


def test_another_denoiser_is_used_while_the_context_is_open(model: LatteModel) -> None:
    conditioning = model.encode(["rocket"])[0]
    before = sample(model, conditioning, 0, steps=2, guidance=1.0).latents[-1]
    changed = LatteModel(Path(model.pipeline.config._name_or_path)).denoiser
    with torch.no_grad():
        changed.proj_out.weight.mul_(2)
    with model.using(changed):
        inside = sample(model, conditioning, 0, steps=2, guidance=1.0).latents[-1]
    after = sample(model, conditioning, 0, steps=2, guidance=1.0).latents[-1]
    assert torch.equal(before, after) and not torch.equal(before, inside)


def test_fingerprints_differ_between_models(model: LatteModel, tiny_folder: Path) -> None:
    assert model.fingerprint() != pixart.PixArtModel(tiny_folder).fingerprint()


def test_the_video_model_is_listed() -> None:
    kinds = {info.name: info for info in models.models()}
    assert kinds["pocket-video"].kind == "video" and kinds["pocket-image"].kind == "image"
    folder = models.ASSETS / "pocket-video"
    assert (folder / "model_index.json").is_file() and kinds["pocket-video"].available
    assert not kinds["pocket-video"].reason


def test_the_kind_of_a_folder_is_read_without_loading_it(
    tiny_video_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert models.kind_of(str(tiny_video_folder)) == "video" and models.kind_of(str(tiny_folder)) == "image"
    assert models.kind_of("pocket-video") == "video" and models.kind_of("random-dit") == "speed"
    assert models.kind_of("nothing") == models.kind_of(str(tmp_path)) == "image"


def test_clips_of_other_sizes_are_refused_in_one_sentence(model: LatteModel) -> None:
    assert model.clip == (FRAMES, 16, 16, 8)
    conditioning = model.encode(["tiger"])[0]
    for shape, got in (
        ((1, 4, 5, 8, 8), "5 frames of 16x16 pixels in 4 latent channels"),
        ((1, 4, 4, 8, 16), "4 frames of 32x16 pixels in 4 latent channels"),
        ((1, 4, 8, 8), r"latents of \(1, 4, 8, 8\)"),
    ):
        sentence = f"model tiny-latte: got {got}; it makes 4 frames of 16x16 pixels .* start from its own"
        with pytest.raises(ShapeError, match=sentence):
            model.denoise(conditioning, torch.zeros(shape), steps=1, guidance=1.0, on_step=lambda *seen: None)
        with pytest.raises(ShapeError, match=sentence):
            model.decode(torch.zeros(shape))


def test_space_and_time_are_calibrated_and_quantized(model: LatteModel, tmp_path: Path) -> None:
    statistics = calibrate(model, ["red apple"], steps=3, guidance=3.0, seed=0)
    recipe = parse_recipe("tr-dq-w4a8", groups=2)
    roles = dict.fromkeys((*recipe.rules[0].roles, *TEMPORAL))
    recipe = dataclasses.replace(recipe, rules=(dataclasses.replace(recipe.rules[0], roles=tuple(roles)),))
    changed = convert(
        model.denoiser, model.linears(), recipe, statistics,
        backend="reference", storage_folder=tmp_path, argument=model.timestep_argument,
    )  # fmt: skip
    quantized = changed.quantized_layers()
    assert {layer.role for layer in model.linears() if layer.name in quantized} >= {*TEMPORAL, "self_q"}
    conditioning = model.encode(["red apple"])[0]
    reference = sample(model, conditioning, 0, steps=3, guidance=3.0)
    with model.using(changed.denoiser):
        run = sample(model, conditioning, 0, steps=3, guidance=3.0)
    metrics = compare_clips(model.decode(run.latents[-1]), model.decode(reference.latents[-1]))
    assert len(metrics.psnr) == FRAMES and 20 < min(metrics.psnr) < 90
    assert metrics.temporal_error > 0
