"""The save command: one recipe, a folder that diffusers loads, the proof that it came back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline

import trdq_core
from trdq_core import cli, runs
from trdq_core.adapters import random_pixart
from trdq_core.errors import ModelError, RecipeError
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.presets import parse_recipe
from trdq_core.saving import recipe_to_save
from trdq_core.specs import RunSpec


def test_the_command_writes_a_folder_and_says_that_it_came_back(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "quantized"
    line = f"save --model {tiny_folder} --recipe tr-dq-w4a8 --steps 2 --calibration-prompts 1 --out {target} --quiet --json"
    assert cli.main(line.split()) == 0
    report = json.loads(capsys.readouterr().out)
    saved, row = report["saved"], report["recipes"]["tr-dq-w4a8"]
    assert saved["bit_equal"] is True and saved["folder"] == str(target) and saved["hub"] is None
    assert saved["bytes"] == sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    assert 0 < saved["denoiser_bytes"] < saved["bytes"]
    assert saved["denoiser_bytes"] < saved["fp_denoiser_bytes"]
    assert f"- PSNR dB: {row['psnr']:.1f}" in (target / "README.md").read_text()
    assert (target / "picture.png").is_file()
    assert not (target / "spec.json").exists()  # the run has a folder of its own
    pipeline = PixArtSigmaPipeline.from_pretrained(target)
    assert isinstance(pipeline.transformer.transformer_blocks[0].attn1.to_q, QuantizedLinear)
    again = cli.main(line.replace("--json", "").split())
    assert again == 2
    assert "there is something in this folder already" in capsys.readouterr().err


def test_without_a_place_the_model_is_in_the_run_folder(tiny_folder: Path, tmp_path: Path) -> None:
    spec = RunSpec(command="save", model=str(tiny_folder), recipes=(parse_recipe("rtn-w8a8"),), steps=2,
                   calibration_prompts=("red apple",))  # fmt: skip
    report = runs.run(spec, tmp_path / "run")
    assert report["saved"]["folder"] == str(tmp_path / "run" / "model")
    assert report["saved"]["bit_equal"] is None  # nothing was sampled
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()


def test_a_model_without_pictures_is_saved_and_compared_by_its_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(random_pixart.LAYERS, "random-pixart-xl", 1)
    spec = RunSpec(command="save", model="random-pixart-xl", recipes=(parse_recipe("rtn-w4a8"),), steps=2,
                   prompts=("owl",), calibration_prompts=("owl",))  # fmt: skip
    report = runs.run(spec, tmp_path / "run")
    row = report["recipes"]["rtn-w4a8"]
    assert report["saved"]["bit_equal"] is True
    assert row["convert_peak_rss_bytes"] > 50 << 20 and row["peak_rss_bytes"] > 50 << 20
    assert row["file_bytes"] > 0 and 2 * row["bf16_file_bytes"] == report["saved"]["fp_denoiser_bytes"]
    assert "psnr" not in row


@pytest.mark.parametrize("names", [(), ("fp",), ("rtn-w8a8", "rtn-w4a8"), ("fp", "rtn-w8a8")])
def test_one_recipe_that_changes_something_is_saved(names: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="save: got .*; give one recipe"):
        recipe_to_save([parse_recipe(name) for name in names])
    assert recipe_to_save([parse_recipe("rtn-w8a8")]).name == "rtn-w8a8"


def test_a_saved_model_samples_as_it_is_and_is_not_quantized_twice(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {
        "model": str(tiny_folder),
        "steps": 2,
        "calibration_prompts": ("red apple",),
        "prompts": ("tiger face",),
    }
    spec = RunSpec(command="save", recipes=(parse_recipe("rtn-w8a8"),), save_to=str(tmp_path / "model"), **settings)
    runs.run(spec, tmp_path / "run")
    settings["model"] = str(tmp_path / "model")
    runs.run(RunSpec(command="sample", **settings), tmp_path / "sampled")
    pictures = [next((tmp_path / folder / "images").glob("*.png")) for folder in ("sampled",)]
    ours = tmp_path / "run" / "images" / "rtn-w8a8_000.png"
    assert pictures[0].read_bytes() == ours.read_bytes()
    with pytest.raises(ModelError, match="this model is quantized already, with rtn-w8a8"):
        runs.run(RunSpec(command="sample", recipes=(parse_recipe("rtn-w4a8"),), **settings), tmp_path / "twice")


def test_the_lines_of_the_readme(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = trdq_core.quantize(tiny_folder, "tr-dq-w4a8", prompts=["red apple"], steps=2)
    trdq_core.save_quantized(pipeline, tmp_path / "model")
    again = DiffusionPipeline.from_pretrained(tmp_path / "model")
    settings = {
        "num_inference_steps": 2,
        "use_resolution_binning": False,
        "clean_caption": False,
        "height": 16,
        "width": 16,
    }
    pictures = [
        one("tiger face", generator=torch.Generator().manual_seed(0), output_type="np", **settings).images
        for one in (pipeline, again)
    ]
    assert np.array_equal(*pictures)
    with pytest.raises(RecipeError, match="give prompts to calibrate it on"):
        trdq_core.quantize(tiny_folder, "tr-dq-w4a8")
    plain = trdq_core.quantize(tiny_folder, "rtn-w8a8")
    assert isinstance(plain.transformer.transformer_blocks[0].attn1.to_q, QuantizedLinear)
