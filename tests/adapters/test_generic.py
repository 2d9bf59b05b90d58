"""Any pipeline: what is refused and in which words, prompts as text, guidance branches, pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan, CogVideoXTransformer3DModel, DiffusionPipeline
from torch import nn

from tests import tiny
from tests.adapters.tiny_families import FAMILIES, build, embeddings_of, with_text
from tests.adapters.unseen import unseen_embeddings, unseen_pipeline
from trdq_core import branches
from trdq_core.adapters import layers_of, load_adapter
from trdq_core.adapters.families import time_by_name
from trdq_core.adapters.generic import TransformerModel
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.placement import notes_on
from trdq_core.adapters.quantizer import TRDQConfig
from trdq_core.errors import ModelError, RecipeError
from trdq_core.presets import parse_recipe
from trdq_core.runs import plan, run
from trdq_core.sampling import sample, sample_batch
from trdq_core.similarity import measure_similarity
from trdq_core.specs import RunSpec
from trdq_core.timegroups import TimeArgument

PROMPT = "red apple"


def tiny_model(name: str) -> TransformerModel:
    model = TransformerModel.of(build(name), name, FAMILIES[name].size)
    model.provide(PROMPT, embeddings_of(name, PROMPT))
    return model


UNET = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
WAN = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (UNET, r"its denoiser is a UNet \(UNet2DConditionModel\); only transformer denoisers are quantized"),
        ({"_class_name": "ShapEPipeline", "prior": ["shap_e", "PriorTransformer"]}, "no component called transformer"),
        ({**WAN, "transformer_2": WAN["transformer"]}, "two denoisers, transformer and transformer_2"),
        ({**WAN, "transformer": ["my_transformer", "Mine"]}, "comes from my_transformer, which would run code"),
        ({**WAN, "_class_name": "MadeUpPipeline"}, "MadeUpPipeline is not one of diffusers"),
        ({**WAN, "_class_name": ["pipeline", "Mine"]}, "is not one of diffusers"),
    ],
)
def test_foreign_folders_are_refused_in_one_sentence(tmp_path: Path, index: dict[str, object], words: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words) as caught:
        load_adapter("model", tmp_path)
    assert "\n" not in str(caught.value)


def test_sizes_that_a_pipeline_takes_shape_its_latents() -> None:
    shapes = []
    for side in (16, 32):
        model = TransformerModel.of(build("sd3"), "sd3", {"height": side, "width": side})
        model.provide(PROMPT, embeddings_of("sd3", PROMPT))
        model.check_size()
        shapes.append(model.initial_latents(0).shape)
    assert [2 * small for small in shapes[0][-2:]] == list(shapes[1][-2:])


@pytest.mark.parametrize(
    ("size", "words"),
    [({"frames": 8}, "takes no frames; it takes height and width, leave --frames out"),
     ({"height": 17, "width": 17}, "does not make height 17, width 17 .*; choose another size")],
)  # fmt: skip
def test_other_sizes_are_refused_in_one_sentence(size: dict[str, int], words: str) -> None:
    model = TransformerModel.of(build("sd3"), "sd3", size)
    model.provide(PROMPT, embeddings_of("sd3", PROMPT))
    with pytest.raises(ModelError, match=words) as caught:
        model.check_size()
    assert "\n" not in str(caught.value)


def test_models_of_one_size_refuse_another(tiny_folder: Path) -> None:
    for name, folder in (("random-dit", None), ("tiny", tiny_folder)):
        with pytest.raises(ModelError, match=f"model {name}: got --height 64, and it makes one size only"):
            load_adapter(name, folder, {"height": 64})


def test_layers_of_foreign_folders_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(UNET))
    with pytest.raises(ModelError, match="its denoiser is a UNet"):
        layers_of("model", tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({**WAN, "transformer": ["diffusers", "FutureTransformer"]}))
    with pytest.raises(ModelError, match="its transformer FutureTransformer is not one of diffusers"):
        layers_of("model", tmp_path)


def test_a_loaded_unet_is_refused() -> None:
    pipeline = DiffusionPipeline()
    pipeline.unet = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="its denoiser is a UNet"):
        TransformerModel.of(pipeline, "model")


def test_pixart_without_its_text_encoder_is_sampled_from_embeddings(tmp_path: Path) -> None:
    tiny.tiny_pipeline(1).save_pretrained(tmp_path / "whole")
    build("pixart-sigma").save_pretrained(tmp_path / "bare")
    assert isinstance(load_adapter("whole", tmp_path / "whole"), PixArtModel)
    assert isinstance(load_adapter("bare", tmp_path / "bare"), TransformerModel)


def test_what_prompts_cannot_be_is_said_in_one_sentence() -> None:
    model = tiny_model("wan")
    with pytest.raises(ModelError, match="saved without its text encoder, so 'tiger' cannot be encoded"):
        model.encode(["tiger"])
    with pytest.raises(ModelError, match="got embeddings called pooled; the names are .* prompt_embeds"):
        model.provide("tiger", {"pooled": torch.zeros(1, 4)})
    classes = tiny_model("dit")
    assert classes.encode(["207"])[0].tensors["class_labels"].tolist() == [207]
    with pytest.raises(ModelError, match="draws one of 1000 classes, and 'tiger' names none"):
        classes.encode(["tiger"])
    with pytest.raises(ModelError, match="saved without its autoencoder"):
        model.decode(model.initial_latents(0))
    with pytest.raises(ModelError, match="saved without its autoencoder"):
        model.encoder_features(np.zeros((1, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("name", ["auraflow", "flux-true-guidance", "wan", "ltx", "latte", "pixart-sigma"])
def test_text_is_encoded_as_the_stock_pipeline_encodes_it(name: str) -> None:
    pipeline = with_text(name)
    model = TransformerModel.of(pipeline, name, FAMILIES[name].size)
    ours = sample(model, model.encode(["green salad"])[0], 5, steps=2, guidance=3.0).latents[-1]
    bare = model._run.arguments(model.encode(["green salad"])[0], 2, 3.0)
    texts = {key: value for key, value in bare.items() if "embeds" not in key and "mask" not in key}
    texts |= {"prompt": "green salad", "negative_prompt": "", "output_type": "latent"}
    texts["generator"] = torch.Generator().manual_seed(5)
    stock = pipeline(**{key: value for key, value in texts.items() if key in model._run.taken})[0]
    assert torch.equal(ours, stock)
    other = sample(model, model.encode(["tiger face"])[0], 5, steps=2, guidance=3.0).latents[-1]
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("name", [name for name, tiny in FAMILIES.items() if tiny.vae])
def test_a_picture_in_between_does_not_change_the_run(name: str) -> None:
    """Pictures come from the pipeline's own call, which begins anew: it sets guidance, timesteps and what solvers keep."""
    model = TransformerModel.of(build(name), name, FAMILIES[name].size)
    model.provide(PROMPT, embeddings_of(name, PROMPT))
    conditioning, guidance = model.encode([PROMPT])[0], 4.0
    alone = sample(model, conditioning, 3, steps=4, guidance=guidance).latents
    watched = sample(
        model, conditioning, 3, steps=4, guidance=guidance, on_step=lambda step, time, latents: model.decode(latents)
    ).latents
    assert all(torch.equal(one, other) for one, other in zip(alone, watched, strict=True))


@pytest.mark.parametrize(
    ("name", "guidance", "expected"),
    [
        ("wan", 3.0, ["conditional", "unconditional"] * 2),
        ("lumina2", 3.0, ["conditional", "unconditional"] * 2),
        ("qwen-image", 3.0, ["conditional", "unconditional"] * 2),
        ("sd3", 3.0, ["joint"] * 2),
        ("z-image", 3.0, ["single"] * 2),
        ("flux", 3.0, ["single"] * 2),
        ("wan", 1.0, ["single"] * 2),
    ],
)
def test_every_call_says_which_branch_it_holds(name: str, guidance: float, expected: list[str]) -> None:
    model, seen = tiny_model(name), []
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(branches.present().branch))
    sample(model, model.encode([PROMPT])[0], 0, steps=2, guidance=guidance)
    assert seen == expected
    assert branches.present().branch == "single"


def test_branches_are_told_by_what_they_are_handed() -> None:
    model, seen = tiny_model("wan"), {}
    given = model.encode([PROMPT])[0].tensors

    def look(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen[branches.present().branch] = kwargs["encoder_hidden_states"]

    model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    sample(model, model.encode([PROMPT])[0], 0, steps=1, guidance=3.0)
    assert torch.equal(seen["conditional"][:, :6], given["prompt_embeds"])
    assert torch.equal(seen["unconditional"][:, :6], given["negative_prompt_embeds"])


@pytest.mark.parametrize(("name", "words"), [("dit", "conditional half of a batch first"), ("wan", "cannot be shared")])
def test_attention_that_cannot_be_compared_is_refused_in_one_sentence(name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        measure_similarity(tiny_model(name), [PROMPT], steps=2, guidance=3.0, seed=0)


def test_a_cancelled_run_leaves_nothing_behind() -> None:
    model = tiny_model("wan")

    def stop(*seen: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, model.encode([PROMPT])[0], 0, steps=2, guidance=3.0, on_step=stop)
    assert branches.present().branch == "single" and branches.present_run() is None
    assert "step" not in vars(model.pipeline.scheduler) and "prepare_latents" not in vars(model.pipeline)
    assert not model.denoiser._forward_hooks and not model.denoiser._forward_pre_hooks


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2", "auraflow", "cogview4", "latte", "wan"])
def test_pictures_are_those_of_the_stock_pipeline(name: str) -> None:
    model = with_autoencoder(name)
    latents = sample(model, model.encode([PROMPT])[0], 7, steps=2, guidance=3.0).latents[-1]
    arguments = model._run.arguments(model.encode([PROMPT])[0], 2, 3.0)
    arguments |= {"generator": torch.Generator().manual_seed(7), "output_type": "np"}
    stock = model.pipeline(**{key: value for key, value in arguments.items() if key in model._run.taken})[0][0]
    picture = model.decode(latents)
    assert picture.dtype == np.uint8 and picture.shape == stock.shape
    assert np.abs(picture / 255 - np.asarray(stock)).max() <= 0.5 / 255 + 1e-5
    assert picture.std() > 0


def with_autoencoder(name: str) -> TransformerModel:
    model = tiny_model(name)
    if name == "wan":
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        model.pipeline.register_modules(vae=vae.eval())
    return model


@pytest.mark.parametrize("name", ["sd3", "latte"])
def test_the_encoder_shows_its_stages(name: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    features = tiny_model(name).encoder_features(pictures)
    assert len(features) == 5 and all(len(one) == 2 for one in features)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux", TimeArgument("timestep", 3, 1000.0)),
        ("z-image", TimeArgument("t", 1, 1000.0, True)),
        ("sd3", TimeArgument("timestep", 3)),
    ],
)
def test_quantizing_at_loading_follows_the_familys_time(name: str, expected: TimeArgument, tmp_path: Path) -> None:
    transformer = build(name).transformer
    transformer.save_pretrained(tmp_path)
    loaded = type(transformer).from_pretrained(tmp_path, quantization_config=TRDQConfig("rtn-w8a8"))
    assert loaded.trdq_conversion.argument == expected
    assert time_by_name(unseen_pipeline().transformer) == TimeArgument("sigma", 2)


def test_fingerprints_follow_weights_size_and_schedule() -> None:
    model = tiny_model("sd3")
    before = model.fingerprint()
    assert tiny_model("sd3").fingerprint() == before
    assert TransformerModel.of(model.pipeline, "other size", {"height": 32, "width": 32}).fingerprint() != before
    with torch.no_grad():
        model.denoiser.proj_out.weight[0, 0] += 1
    assert model.fingerprint() != before


@pytest.mark.parametrize("name", ["wan", "flux", "z-image"])
def test_several_prompts_are_sampled_at_once(name: str) -> None:
    model = tiny_model(name)
    model.provide("tiger", embeddings_of(name, "tiger"))
    both, seeds = model.encode([PROMPT, "tiger"]), [1, 2]
    together = sample_batch(model, both, seeds, steps=2, guidance=3.0)
    pairs = zip(both, seeds, strict=True)
    alone = torch.cat([sample(model, one, seed, steps=2, guidance=3.0).latents[-1] for one, seed in pairs])
    assert torch.allclose(together, alone, atol=1e-4)


def test_clips_have_the_size_that_is_sampled() -> None:
    assert tiny_model("wan").clip == (5, 64, 64, 16)
    assert tiny_model("cogvideox").clip == (5, 64, 64, 8)
    assert tiny_model("ltx").clip == (9, 128, 128, 25)
    assert tiny_model("latte").clip == (2, 64, 64, 8)
    assert tiny_model("sd3").clip is None and tiny_model("dit").clip is None


def run_compare(folder: Path, run_folder: Path) -> dict[str, Any]:
    """One comparison by the door that the command line and the studio use."""
    spec = RunSpec(
        command="compare", model=str(folder), prompts=("green salad",), calibration_prompts=("red apple",), steps=2,
        guidance=3.0, recipes=(parse_recipe("fp"), parse_recipe("rtn-w8a8")), backend="reference", timing_rounds=2,
    )  # fmt: skip
    return run(spec, run_folder)


def test_a_folder_of_pictures_is_compared_from_end_to_end(tmp_path: Path) -> None:
    with_text("auraflow").save_pretrained(tmp_path / "auraflow")
    report = run_compare(tmp_path / "auraflow", tmp_path / "run")
    row = report["recipes"]["rtn-w8a8"]
    assert row["kind"] == "quantized" and 30 < row["psnr"] < 90
    assert (tmp_path / "run" / row["images"][0]).is_file()


def test_a_folder_of_clips_is_compared_from_end_to_end(tmp_path: Path) -> None:
    tiny_clips().save_pretrained(tmp_path / "cogvideox")
    report = run_compare(tmp_path / "cogvideox", tmp_path / "run")
    row = report["recipes"]["rtn-w8a8"]
    assert row["kind"] == "quantized" and 30 < row["psnr"] < 90
    assert len(list((tmp_path / "run" / row["frames"][0]).glob("*.png"))) == 9


def tiny_clips() -> DiffusionPipeline:
    """CogVideoX with text, an autoencoder over time, and its own size in its configuration."""
    pipeline = with_text("cogvideox")
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_height=64, sample_width=64,
    )  # fmt: skip
    config = {**FAMILIES["cogvideox"].config, "max_text_seq_length": 226, "sample_frames": 9}
    pipeline.register_modules(vae=vae.eval(), transformer=CogVideoXTransformer3DModel(**config))
    return pipeline


def test_plans_say_what_stays_because_it_is_no_linear(tmp_path: Path) -> None:
    build("sana").save_pretrained(tmp_path / "sana")
    build("sd3").save_pretrained(tmp_path / "sd3")
    (note,) = plan(str(tmp_path / "sana"), parse_recipe("rtn-w8a8"), backend="reference").notes
    assert re.match(r"\d+% of the transformer's weights are in 4 convolutions, transformer_blocks.0.ff.conv_\w+", note)
    assert plan(str(tmp_path / "sd3"), parse_recipe("rtn-w8a8"), backend="reference").notes == ()
    said = notes_on(unseen_pipeline().transformer)
    assert [note.split(" ", 2)[0] for note in said] == ["4", "UnseenTransformer"]


def test_an_unseen_pipeline_takes_text_only_as_embeddings() -> None:
    model = TransformerModel.of(unseen_pipeline(), "unseen")
    with pytest.raises(ModelError, match="without its text encoder, so 'apple' cannot be encoded"):
        model.encode(["apple"])
    model.provide("apple", unseen_embeddings())
    assert model.initial_latents(3).shape == (1, 4, 8, 8)
