"""The ways diffusers loads: shards, device maps, quantizing while loading, saving again; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from torch import Tensor, nn

import trdq_core
from tests.checkpoints.conftest import Convert, reload
from trdq_core import branches, runs
from trdq_core.adapters import layers_of
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.saving import Saved, save_quantized
from trdq_core.errors import CheckpointError, ModelError, RecipeError, StorageError
from trdq_core.presets import make_recipe, parse_recipe, with_sharing
from trdq_core.specs import RunSpec, SharingSpec
from trdq_core.statistics import Statistics

Picture = Callable[[nn.Module], Tensor]
SWITCHED = dataclasses.replace(make_recipe("tr-dq", weight_bits=4, groups=2), do_no_harm=False)


@pytest.fixture(scope="module")
def saved(convert_tiny: Convert, picture: Picture, save: Callable[..., Saved], tmp_path_factory) -> tuple[Path, Tensor]:
    conversion = convert_tiny(SWITCHED)
    live = picture(conversion.denoiser)
    return save(conversion, tmp_path_factory.mktemp("loading") / "pipeline", max_shard_size="200KB").folder, live


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
def test_shards_and_device_maps(saved: tuple[Path, Tensor], picture: Picture, device_map: object) -> None:
    folder, live = saved
    assert len(list((folder / "transformer").glob("*.safetensors"))) >= 4
    denoiser = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer", device_map=device_map)
    assert torch.equal(picture(denoiser), live)


def test_layers_on_disk_are_refused(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='device_map: it puts layers on "disk"'):
        PixArtTransformer2DModel.from_pretrained(
            saved[0] / "transformer", device_map={"": "disk"}, offload_folder=tmp_path
        )


def test_a_loaded_pipeline_is_saved_again_whichever_set_is_active(
    saved: tuple[Path, Tensor], picture: Picture, tmp_path: Path
) -> None:
    folder, live = saved
    pipeline = DiffusionPipeline.from_pretrained(folder)
    context = pipeline.transformer.trdq_conversion.time
    context.set(900.0)
    assert context.group == 1
    pipeline.save_pretrained(tmp_path / "again")
    assert torch.equal(picture(reload(tmp_path / "again")), live)
    again = reload(tmp_path / "again")
    again.save_pretrained(tmp_path / "again" / "transformer")  # over the very file that its sets are mapped from
    assert torch.equal(picture(again), live)
    assert torch.equal(picture(reload(tmp_path / "again")), live)


def test_a_recipe_without_data_is_made_while_loading(
    model: PixArtModel, convert_tiny: Convert, picture: Picture, tmp_path: Path
) -> None:
    model.pipeline.save_pretrained(tmp_path / "full")
    expected = picture(convert_tiny(parse_recipe("rtn-w4a8")).denoiser)
    config = trdq_core.TRDQConfig("rtn-w4a8")
    alone = PixArtTransformer2DModel.from_pretrained(
        tmp_path / "full", subfolder="transformer", quantization_config=config
    )
    assert torch.equal(picture(alone), expected)
    mapped = PipelineQuantizationConfig(quant_mapping={"transformer": trdq_core.TRDQConfig("rtn-w4a8")})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "full", quantization_config=mapped)
    assert torch.equal(picture(pipeline.transformer), expected)
    pipeline.save_pretrained(tmp_path / "quantized")
    assert torch.equal(picture(reload(tmp_path / "quantized")), expected)
    text = (tmp_path / "quantized" / "transformer" / "config.json").read_text()
    assert str(tmp_path) not in json.dumps(json.loads(text)["quantization_config"])


def test_a_recipe_that_needs_data_takes_a_stored_calibration(
    model: PixArtModel, statistics: Statistics, convert_tiny: Convert, picture: Picture, tmp_path: Path
) -> None:
    model.denoiser.save_pretrained(tmp_path / "full")
    statistics.save(tmp_path / "calibration")
    expected = picture(convert_tiny(SWITCHED).denoiser)
    config = trdq_core.TRDQConfig(SWITCHED, calibration=tmp_path / "calibration")
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "full", quantization_config=config)
    assert torch.equal(picture(loaded), expected)


@pytest.mark.parametrize("name", ["tr-dq-w4a8", "rtn-static-w8a8", "svdquant-w4a4", "tq-dit-w8a8", "quarot-w4a4"])
def test_a_recipe_that_needs_data_is_refused_without(model: PixArtModel, name: str, tmp_path: Path) -> None:
    model.denoiser.save_pretrained(tmp_path / "full")
    with pytest.raises(RecipeError, match=f"{name}: its .* has to be calibrated; run python -m trdq_core save"):
        PixArtTransformer2DModel.from_pretrained(tmp_path / "full", quantization_config=trdq_core.TRDQConfig(name))


def test_what_was_not_quantized_is_not_saved_and_nothing_is_overwritten(
    model: PixArtModel, convert_tiny: Convert, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="PixArtSigmaPipeline: none of its parts was quantized"):
        save_quantized(model.pipeline, tmp_path / "x")
    with pytest.raises(CheckpointError, match="Linear: it was not quantized by TR-DQ Studio"):
        save_quantized(nn.Linear(2, 2), tmp_path / "x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    conversion = convert_tiny(parse_recipe("rtn-w8a8"))
    with pytest.raises(StorageError, match="taken: there is something in this folder already"):
        save_quantized(conversion, tmp_path / "taken")
    with pytest.raises(StorageError, match="could not be written"):
        save_quantized(conversion, tmp_path / "taken" / "thesis.txt" / "model")
    assert [file.name for file in tmp_path.rglob("*")] == ["taken", "thesis.txt"]


def test_pickles_are_not_written(convert_tiny: Convert, tmp_path: Path) -> None:
    conversion = convert_tiny(parse_recipe("rtn-w8a8"))
    save_quantized(conversion, tmp_path / "model")
    with pytest.raises(CheckpointError, match="quantized models are saved as safetensors"):
        conversion.denoiser.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def test_a_loaded_plan_shares_where_the_branches_are_told(convert_tiny: Convert, tmp_path: Path) -> None:
    recipe = with_sharing(parse_recipe("rtn-w8a8"), SharingSpec(blocks=((0,),)))
    save_quantized(convert_tiny(recipe), tmp_path / "model")
    denoiser = PixArtTransformer2DModel.from_pretrained(tmp_path / "model")
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(2, 5, 32)
    call = {
        "hidden_states": torch.cat([latents] * 2),
        "encoder_hidden_states": text,
        "timestep": torch.tensor([500.0] * 2),
    }
    with torch.no_grad():
        denoiser(**call)
        counted = [denoiser.trdq_conversion.facts()["sharing"]["shared_calls"]]
        with branches.joint():
            denoiser(**call)
        counted.append(denoiser.trdq_conversion.facts()["sharing"]["shared_calls"])
    assert counted == [0, 1]


def test_a_lora_is_refused_with_what_to_do_instead(saved: tuple[Path, Tensor]) -> None:
    denoiser = reload(saved[0])
    with pytest.raises(ModelError, match=r"load the LoRA onto the original pipeline, call fuse_lora\(\)"):
        denoiser.load_lora_adapter({"x": torch.zeros(1)})


def test_a_fused_lora_is_quantized_with_the_model(
    model: PixArtModel, convert_tiny: Convert, picture: Picture, tmp_path: Path
) -> None:
    """What fuse_lora leaves behind are plain linears with other weights; they are what is quantized."""
    plain = picture(convert_tiny(parse_recipe("rtn-w8a8")).denoiser)
    linear = model.denoiser.transformer_blocks[0].attn1.to_q
    delta = (
        0.3
        * torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
        @ torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    )
    before = linear.weight.detach().clone()
    try:
        linear.weight.data += delta
        full, conversion = picture(model.denoiser), convert_tiny(parse_recipe("rtn-w8a8"))
        fused = picture(conversion.denoiser)
        save_quantized(conversion, tmp_path / "fused")
    finally:
        linear.weight.data = before
    assert (fused - full).norm() < 0.2 * (fused - plain).norm()
    assert torch.equal(picture(PixArtTransformer2DModel.from_pretrained(tmp_path / "fused")), fused)


def test_a_quantized_folder_is_neither_planned_nor_looked_at_as_full_precision(
    saved: tuple[Path, Tensor],
) -> None:
    words = r"this model is quantized already, with .*; give the full-precision one\. It can be sampled as it is"
    name = SWITCHED.name
    with pytest.raises(ModelError, match=words.replace(".*", name)):
        layers_of("pipeline", saved[0])
    model = PixArtModel(saved[0])  # sampling it is possible
    with pytest.raises(ModelError, match=words.replace(".*", name)):
        model.linears()
    with pytest.raises(ModelError, match=words.replace(".*", name)):
        runs.run(RunSpec(command="compare", model=str(saved[0]), prompts=("owl",), steps=2), saved[0].parent / "run")


def test_a_configuration_for_a_part_that_is_no_transformer_is_refused(model: PixArtModel, tmp_path: Path) -> None:
    model.pipeline.save_pretrained(tmp_path / "full")
    for part, words in {
        "vae": r"AutoencoderKL: rtn-w8a8 quantizes none of its layers; .*name \"transformer\" in quant_mapping",
        "text_encoder": r"TRDQConfig: it was given for a model of transformers, .*name \"transformer\" in quant_mapping",
    }.items():
        mapped = PipelineQuantizationConfig(quant_mapping={part: trdq_core.TRDQConfig("rtn-w8a8")})
        with pytest.raises(RecipeError, match=words):
            DiffusionPipeline.from_pretrained(tmp_path / "full", quantization_config=mapped)
