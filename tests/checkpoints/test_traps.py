"""The traps of joining diffusers from outside, each of which once lost data or failed: one test for each, by its number."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors import safe_open

from tests.checkpoints.conftest import Convert
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.quantizer import TRDQConfig, TRDQQuantizer
from trdq_core.adapters.saving import save_quantized
from trdq_core.convert import convert
from trdq_core.errors import CheckpointError
from trdq_core.kernels import dispatch
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.presets import parse_recipe
from trdq_core.statistics import Statistics


@pytest.fixture(scope="module")
def folder(convert_tiny: Convert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("traps") / "model"
    save_quantized(convert_tiny(parse_recipe("tr-dq-w4a8")), target)
    return target


def test_trap_1_quant_method_is_an_enumeration_whose_value_is_read() -> None:
    method = TRDQConfig().quant_method
    assert isinstance(method, Enum) and isinstance(method, str)
    assert method.value == "trdq" and method in AUTO_QUANTIZER_MAPPING and method in AUTO_QUANTIZATION_CONFIG_MAPPING
    assert json.loads(json.dumps(TRDQConfig().to_dict()))["quant_method"] == "trdq"


def test_trap_2_the_configuration_has_a_representation_of_its_own() -> None:
    config = TRDQConfig("rtn-w4a8")
    assert repr(config) == "TRDQConfig(recipe='rtn-w4a8', format_version=1)"
    assert TRDQConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string(use_diff=False))["recipe"]["name"] == "rtn-w4a8"


def test_trap_3_a_live_model_is_saved_with_its_quantization_config(
    convert_tiny: Convert, folder: Path, tmp_path: Path
) -> None:
    conversion = convert_tiny(parse_recipe("rtn-w8a8"))
    save_quantized(conversion, tmp_path / "live")
    stored = json.loads((tmp_path / "live" / "config.json").read_text())
    assert stored["quantization_config"]["recipe"]["name"] == "rtn-w8a8"
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "live")
    assert sum(isinstance(module, QuantizedLinear) for module in again.modules()) == 10
    # And a loaded one by save_pretrained alone, several times.
    for name in ("second", "third"):
        again.save_pretrained(tmp_path / name)
        stored = json.loads((tmp_path / name / "config.json").read_text())
        assert stored["quantization_config"]["recipe"]["name"] == "rtn-w8a8"
        again = PixArtTransformer2DModel.from_pretrained(tmp_path / name)
    for name, tensor in conversion.denoiser.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("whole", [False, True])
def test_trap_3_diffusers_alone_saves_a_conversion_with_its_quantization_config(
    whole: bool, model: PixArtModel, convert_tiny: Convert, tmp_path: Path
) -> None:
    """Nothing of ours was called between converting and save_pretrained, of the denoiser or of a pipeline around it."""
    conversion = convert_tiny(parse_recipe("rtn-w8a8"))
    with model.using(conversion.denoiser):
        (model.pipeline if whole else conversion.denoiser).save_pretrained(tmp_path / "live")
    part = tmp_path / "live" / "transformer" if whole else tmp_path / "live"
    assert json.loads((part / "config.json").read_text())["quantization_config"]["recipe"]["name"] == "rtn-w8a8"
    again = PixArtTransformer2DModel.from_pretrained(part)
    assert set(again.trdq_conversion.quantized_layers()) == set(conversion.quantized_layers()) != set()
    for name, tensor in conversion.denoiser.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert "quantization_config" not in model.denoiser.config  # the one it was made of stays what it was


def test_trap_3_a_conversion_that_was_cast_says_its_type(
    model: PixArtModel, statistics: Statistics, tmp_path: Path
) -> None:
    conversion = convert(
        copy.deepcopy(model.denoiser), model.linears(), parse_recipe("rtn-w8a8"), statistics,
        backend=dispatch.select_backend(torch.device("cpu")), storage_folder=tmp_path, in_place=True,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        conversion.denoiser.to(dtype).save_pretrained(tmp_path / str(dtype))
        assert PixArtTransformer2DModel.from_pretrained(tmp_path / str(dtype)).proj_out.weight.dtype is dtype


def test_trap_3_a_copy_of_a_quantized_model_is_not_saved_as_the_other_one(
    convert_tiny: Convert, folder: Path, tmp_path: Path
) -> None:
    for model in (convert_tiny(parse_recipe("rtn-w8a8")).denoiser, PixArtTransformer2DModel.from_pretrained(folder)):
        twin = copy.deepcopy(model)
        with pytest.raises(CheckpointError, match="is a copy of a quantized one; save the model that was converted"):
            twin.save_pretrained(tmp_path / "twin")
        with pytest.raises(CheckpointError, match="it is a copy of a quantized model; save the model that was conver"):
            save_quantized(twin, tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_trap_4_scales_stay_fp32_whatever_torch_dtype_says(folder: Path, dtype: torch.dtype | None) -> None:
    loaded = PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    with safe_open(next(folder.glob("*.safetensors")), "pt") as stored:
        for prefix, module in loaded.named_modules():
            if isinstance(module, (QuantizedLinear, InputQuantizer)):
                for name, buffer in module.named_buffers(recurse=False):
                    exact = stored.get_tensor(f"{prefix}.{name}")
                    assert buffer.dtype is exact.dtype and torch.equal(buffer, exact), f"{prefix}.{name}"
    assert loaded.proj_out.weight.dtype is (dtype or torch.float32)
    assert loaded.transformer_blocks[0].attn1.to_q.weight_scale.dtype is torch.float32


def test_trap_5_importing_the_package_first_is_enough(folder: Path, root: Path) -> None:
    """The other order, diffusers first, is that of the imports above."""
    code = f"""import sys, trdq_core
assert not {{"torch", "diffusers"}} & set(sys.modules)
from diffusers import PixArtTransformer2DModel
model = PixArtTransformer2DModel.from_pretrained({str(folder)!r})
print(type(model.transformer_blocks[0].attn1.to_q).__name__)"""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QuantizedLinear"


@pytest.mark.parametrize("first", ["trdq_core.TRDQConfig", "trdq_core.save_quantized", "trdq_core.adapters.lora"])
def test_trap_5_whatever_of_the_package_is_asked_for_first(first: str, root: Path) -> None:
    """Its modules import those that they are registered with, so either may be half imported when the other asks."""
    code = f"""import importlib, trdq_core
importlib.import_module("trdq_core.adapters.lora") if {first!r}.endswith("lora") else {first}
from diffusers import FluxPipeline, ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as others
from trdq_core import convert
assert ModelMixin.from_pretrained.__func__.trdq_guarded and FluxPipeline.load_lora_weights.trdq_guarded
print(AUTO_QUANTIZER_MAPPING["trdq"].__name__, "trdq" in others, len(convert._ON_CONVERSION))"""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "TRDQQuantizer True 1", done.stderr


def test_trap_6_another_recipe_on_a_quantized_folder_is_ignored_with_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = PixArtTransformer2DModel.from_pretrained(folder, quantization_config=TRDQConfig("rtn-w8a8"))
    assert loaded.trdq_conversion.recipe.name == "tr-dq-w4a8"
    assert loaded.hf_quantizer.quantization_config.recipe.name == "tr-dq-w4a8"


def test_trap_7_tables_that_no_checkpoint_holds_come_back_in_the_type_they_had(
    model: PixArtModel, statistics: Statistics, tmp_path: Path
) -> None:
    cast = copy.deepcopy(model.denoiser).to(torch.bfloat16)  # its table of positions too; loading keeps that in fp32
    assert "pos_embed.pos_embed" not in cast.state_dict()
    assert cast.pos_embed.pos_embed.dtype is torch.bfloat16
    live = convert(
        cast, model.linears(), parse_recipe("rtn-w8a8"), statistics,
        backend=dispatch.select_backend(torch.device("cpu")), storage_folder=tmp_path,
    )  # fmt: skip
    save_quantized(live, tmp_path / "model")
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "model")
    assert loaded.pos_embed.pos_embed.dtype is torch.bfloat16
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(2, 5, 32, dtype=torch.bfloat16),
        "timestep": torch.tensor([500.0, 500.0], dtype=torch.bfloat16),
    }
    with torch.no_grad():
        assert torch.equal(loaded(**call).sample, live.denoiser(**call).sample)


def test_casting_a_saved_or_loaded_model_is_refused(folder: Path) -> None:
    loaded = PixArtTransformer2DModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        loaded.to(torch.bfloat16)
    assert isinstance(loaded.hf_quantizer, TRDQQuantizer)
