"""Loading a PixArt folder: what is refused and in which words; and sampling it with equal everything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trdq_core.adapters.pixart import PixArtModel, layers_from_config
from trdq_core.errors import ModelError
from trdq_core.sampling import sample

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def plant_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def lose_a_tensor(folder: Path, part: str = "transformer") -> None:
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, file)


def make_foreign(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "safetensors is truncated or damaged"),
        (plant_nan, "proj_out.weight in .* holds NaN or infinity"),
        (
            lose_a_tensor,
            "transformer_blocks.1.scale_shift_table is in no file of its transformer; copy the folder again",
        ),
        (lambda f: lose_a_tensor(f, "vae"), "is in no file of its vae; copy the folder again"),
        (make_foreign, "its pipeline is StableDiffusionPipeline; supported are PixArtSigmaPipeline"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is damaged"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda f: (f / WEIGHTS).unlink(), "the transformer has no safetensors file"),
        (lambda f: (f / "transformer" / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin is a pickle file"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "diffusers could not load it"),
        (lambda f: shutil.rmtree(f), "there is no folder model"),
    ],
)
def test_bad_folders_are_refused_in_one_sentence(copy: Path, damage: object, words: str) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=words) as caught:
        PixArtModel(copy)
    assert "\n" not in str(caught.value)


def test_layers_need_no_weights(model: PixArtModel, copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    assert layers_from_config(copy) == model.linears()


def test_the_same_seed_gives_the_same_latents_and_callbacks_see_every_step(model: PixArtModel) -> None:
    conditioning = model.encode(["red apple"])[0]
    runs = [sample(model, conditioning, 3, steps=4, guidance=3.5) for _ in range(2)]
    assert len(runs[0].latents) == 4
    assert runs[0].timesteps == sorted(runs[0].timesteps, reverse=True)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].latents, runs[1].latents, strict=True))
    other = sample(model, conditioning, 4, steps=4, guidance=3.5)
    assert not torch.equal(other.latents[-1], runs[0].latents[-1])
    assert model.decode(runs[0].latents[-1]).shape == (16, 16, 3)


def test_guidance_one_runs_a_single_branch(model: PixArtModel) -> None:
    sizes = []
    handle = model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    for guidance in (1.0, 3.5):
        sample(model, model.encode(["red apple"])[0], 0, steps=2, guidance=guidance)
    handle.remove()
    assert sizes == [1, 1, 2, 2]


def test_fingerprints_follow_the_weights(model: PixArtModel, copy: Path) -> None:
    before = PixArtModel(copy).fingerprint()
    assert before == PixArtModel(copy).fingerprint() == model.fingerprint()
    tensors = load_file(copy / WEIGHTS)
    tensors["proj_out.weight"][0, 0] += 1
    save_file(tensors, copy / WEIGHTS)
    assert PixArtModel(copy).fingerprint() != before
