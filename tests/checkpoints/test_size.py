"""What a report says a file takes is what the file takes, and codes of odd widths lie in it without a gap."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn

from tests.checkpoints.conftest import Convert
from tests.checkpoints.damage import Stored
from trdq_core.adapters.saving import save_quantized
from trdq_core.checkpoints.manifest import KEY
from trdq_core.errors import CheckpointError
from trdq_core.presets import make_recipe, parse_recipe
from trdq_core.specs import Recipe

FILE = "diffusion_pytorch_model.safetensors"
Picture = Callable[[nn.Module], Tensor]


def grouped(bits: int, storage: str) -> Recipe:
    recipe = make_recipe("tr-dq", weight_bits=bits, groups=2, storage=storage)
    return dataclasses.replace(recipe, do_no_harm=False)


@pytest.mark.parametrize(
    "recipe",
    [parse_recipe("rtn-w8a8"), parse_recipe("rtn-w3a8"), parse_recipe("q-dit-w4a8"), grouped(3, "switched"),
     grouped(6, "resident")],
    ids=["bytes", "tight", "simulated", "switched", "resident"],
)  # fmt: skip
def test_a_report_counts_the_bytes_of_the_file(recipe: Recipe, convert_tiny: Convert, tmp_path: Path) -> None:
    conversion = convert_tiny(recipe)
    told = conversion.facts()["file_bytes"]
    save_quantized(conversion, tmp_path / "model")
    assert told == (tmp_path / "model" / FILE).stat().st_size
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "model")
    assert loaded.trdq_conversion.facts()["file_bytes"] == told


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_eight_weights_take_as_many_bytes_as_each_has_bits(
    bits: int, convert_tiny: Convert, picture: Picture, tmp_path: Path
) -> None:
    conversion = convert_tiny(parse_recipe(f"rtn-w{bits}a8"))
    live = picture(conversion.denoiser)
    folder = save_quantized(conversion, tmp_path / "model").folder
    stored = load_file(folder / FILE)
    for name, layer in conversion.quantized_layers().items():
        assert stored[f"{name}.qweight"].nbytes == layer.in_features * layer.out_features * bits // 8
    version = 2 if bits not in (4, 8) else 1  # what older versions can read is written as they read it
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == version
    loaded = PixArtTransformer2DModel.from_pretrained(folder)
    assert torch.equal(picture(loaded), live)
    for name, layer in conversion.quantized_layers().items():
        assert torch.equal(loaded.get_submodule(name).qweight, layer.qweight)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / FILE)
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)


def loosen(folder: Path, conversion_layers: dict[str, nn.Module]) -> None:
    """Make of a saved model what version 1 wrote: integers as kernels read them."""
    stored = Stored(folder)
    stored.tensors |= {f"{name}.qweight": layer.qweight for name, layer in conversion_layers.items()}
    stored.manifest["format_version"] = 1
    stored.write()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))


def test_files_of_the_first_version_are_read(convert_tiny: Convert, picture: Picture, tmp_path: Path) -> None:
    conversion = convert_tiny(parse_recipe("rtn-w3a8"))
    folder = save_quantized(conversion, tmp_path / "model").folder
    loosen(folder, conversion.quantized_layers())
    with safe_open(folder / FILE, "pt") as handle:
        assert json.loads(handle.metadata()[KEY])["format_version"] == 1
    loaded = PixArtTransformer2DModel.from_pretrained(folder)
    assert torch.equal(picture(loaded), picture(conversion.denoiser))


def test_a_wrong_word_of_the_format_is_refused(convert_tiny: Convert, tmp_path: Path) -> None:
    conversion = convert_tiny(parse_recipe("rtn-w3a8"))
    folder = save_quantized(conversion, tmp_path / "model").folder
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json names another format"):
        PixArtTransformer2DModel.from_pretrained(folder)
    stored = Stored(folder)
    stored.manifest["format_version"] = 1
    stored.write()
    with pytest.raises(CheckpointError, match="qweight is U8 .*, its recipe makes U8"):
        PixArtTransformer2DModel.from_pretrained(folder)
