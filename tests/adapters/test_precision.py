"""How a model is loaded: which precision is chosen where, whole runs in bfloat16, and parts that wait outside of the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from tests.adapters.tiny_families import FAMILIES, build, embeddings_of
from trdq_core import models, runs
from trdq_core.adapters import precision
from trdq_core.adapters.generic import TransformerModel
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.precision import choose_dtype, place, stored_dtype
from trdq_core.errors import ModelError
from trdq_core.presets import parse_recipe
from trdq_core.sampling import sample
from trdq_core.specs import Loading, RunSpec

BF16 = Loading(dtype="bf16")


def folder_of(tmp_path: Path, transformer: str, dtype: torch.dtype) -> Path:
    """As much of a diffusers folder as the choice looks at."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", transformer]}))
    tensors = {"a": torch.zeros(2, dtype=dtype), "b": torch.zeros(2, dtype=dtype), "c": torch.zeros(2)}
    save_file(tensors, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("transformer", "stored", "chosen"),
    [
        ("PixArtTransformer2DModel", torch.float32, "float16"),
        ("PixArtTransformer2DModel", torch.bfloat16, "bfloat16"),
        ("QwenImageTransformer2DModel", torch.float32, "bfloat16"),
        ("QwenImageTransformer2DModel", torch.bfloat16, "bfloat16"),
        ("SanaTransformer2DModel", torch.float16, "float16"),
        ("NobodyHasSeenIt", torch.float32, "float16"),
    ],
)
def test_a_gpu_gets_what_a_model_was_published_in(
    transformer: str, stored: torch.dtype, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, transformer, stored)
    monkeypatch.setattr(precision, "_gpu_has_bfloat16", lambda: True)
    assert choose_dtype(folder, "auto", "cuda") == chosen
    monkeypatch.setattr(precision, "_gpu_has_bfloat16", lambda: False)
    assert choose_dtype(folder, "auto", "cuda") == ("float32" if chosen == "bfloat16" else chosen)
    assert choose_dtype(folder, "auto", "cpu") == "float32"
    for asked, name in precision.NAMES.items():
        assert choose_dtype(folder, asked, "cuda") == choose_dtype(folder, asked, "cpu") == name


def test_families_listed_as_bfloat16_are_families_known_here() -> None:
    from trdq_core.adapters.families import FAMILIES as KNOWN

    assert set(KNOWN) >= precision.RUN_IN_BFLOAT16


def test_a_folder_that_tells_nothing_is_left_to_loading(tmp_path: Path) -> None:
    assert stored_dtype(tmp_path) is None
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "x.safetensors").write_bytes(b"damaged")
    assert stored_dtype(tmp_path) is None
    assert choose_dtype(tmp_path, "auto", "cuda") == "float16"


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_a_run_in_bfloat16_calibrates_converts_samples_and_saves(
    kind: str, tiny_folder: Path, tiny_video_folder: Path, tmp_path: Path
) -> None:
    folder = tiny_folder if kind == "picture" else tiny_video_folder
    common: dict[str, Any] = {
        "model": str(folder), "prompts": ("red apple",), "calibration_prompts": ("green salad",), "steps": 2, "dtype": "bf16",
    }  # fmt: skip
    names = ("fp", "rtn-w8a8", "tr-dq-w4a8", *(["svdquant-w4a4"] if kind == "picture" else []))
    recipes = tuple(parse_recipe(name) for name in names)
    report = runs.run(RunSpec(command="compare", recipes=recipes, timing_rounds=1, **common), tmp_path / "compare")
    assert report["reference"] == {"label": "BF16", "dtype": "bfloat16", "device": "cpu"}
    rows = report["recipes"]
    assert rows["fp"]["label"] == "BF16"
    assert rows["fp-again"]["identical"]
    assert all(rows[recipe.name]["psnr"] > 10 for recipe in recipes[1:])
    spec = RunSpec(command="save", recipes=recipes[2:3], save_to=str(tmp_path / "saved"), **common)
    saved = runs.run(spec, tmp_path / "save")["saved"]
    assert saved["bit_equal"]
    with safe_open(next((tmp_path / "saved" / "transformer").glob("*.safetensors")), "pt") as stored:
        tensors = {key: stored.get_slice(key).get_dtype() for key in stored.keys()}  # noqa: SIM118 - no mapping
    assert {dtype for key, dtype in tensors.items() if key.startswith(("pos_embed.", "proj_out."))} == {"BF16"}
    assert {dtype for key, dtype in tensors.items() if key.endswith("weight_scale")} == {"F32"}


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen-image"])
def test_families_sample_in_bfloat16(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    model = TransformerModel(tmp_path, size=FAMILIES[family].size, loading=BF16)
    embeds = embeddings_of(family, "red apple")
    model.provide("red apple", {k: v.bfloat16() if v.is_floating_point() else v for k, v in embeds.items()})
    assert model.dtype is torch.bfloat16 and model.denoiser.dtype is torch.bfloat16
    run = sample(model, model.encode(["red apple"])[0], 0, steps=2, guidance=3.0)
    assert torch.isfinite(run.latents[-1].float()).all()


def test_precisions_have_calibrations_of_their_own(tiny_folder: Path) -> None:
    in_full = models.load_model(str(tiny_folder))
    in_half = models.load_model(str(tiny_folder), loading=BF16)
    assert in_full.fingerprint() != in_half.fingerprint()


def test_offload_without_a_gpu_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    for anyway in (True, False):
        with pytest.raises(ModelError, match="--offload model: there is no GPU .* --dtype bf16"):
            models.load_model(str(tiny_folder), anyway=anyway, loading=Loading(offload="model"))
    spec = RunSpec(command="sample", model=str(tiny_folder), prompts=("x",), steps=2, offload="sequential")
    with pytest.raises(ModelError, match="--offload sequential: there is no GPU"):
        runs.run(spec, tmp_path)


def test_models_of_random_weights_take_neither() -> None:
    with pytest.raises(ModelError, match="random-dit: got --dtype bf16"):
        models.load_model("random-dit", loading=BF16)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_parts_give_the_same_pictures(offload: str, tiny_folder: Path) -> None:
    def picture(model: PixArtModel) -> tuple[Any, list[torch.Tensor]]:
        run = sample(model, model.encode(["red apple"])[0], 0, steps=2, guidance=3.0)
        made = model.decode(run.latents[-1])
        return made, model.encoder_features(made[None])

    expected, features = picture(PixArtModel(tiny_folder))
    model = PixArtModel(tiny_folder, loading=Loading(offload=offload))  # on this device, but by the same hooks
    found, same_features = picture(model)
    assert (found == expected).all()
    assert all(torch.equal(a, b) for a, b in zip(features, same_features, strict=True))
    assert not hasattr(model.denoiser, "_hf_hook"), "copies of the denoiser would share it"
    assert model.pipeline.text_encoder._hf_hook is not None
    assert next(model.pipeline.text_encoder.parameters()).is_meta == (offload == "sequential")


def test_one_part_at_a_time_is_on_the_device(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, moves = PixArtModel(tiny_folder, loading=Loading(offload="model")), []
    for name in ("text_encoder", "vae"):
        part = getattr(model.pipeline, name)
        monkeypatch.setattr(part, "to", lambda where, name=name: moves.append((name, str(where), type(where))))
    model.encode(["red apple"])
    assert {(name, kind is str) for name, _, kind in moves} == {("vae", True), ("text_encoder", False)}
    moves.clear()
    model.decode(model.initial_latents(0))
    assert {(name, kind is str) for name, _, kind in moves} == {("vae", False), ("text_encoder", True)}


@pytest.mark.parametrize("family", ["dit", "sd3"])
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_a_pipeline_finds_the_device_it_runs_on(family: str, offload: str) -> None:
    pipeline: DiffusionPipeline = build(family)
    place(pipeline, torch.device("meta"), offload)  # any other device than the one that parts wait on
    assert pipeline._execution_device.type == "meta"
    assert pipeline.transformer.device.type == "meta"
    parked = next(pipeline.vae.parameters()).device.type
    assert parked == ("meta" if offload == "sequential" else "cpu")
