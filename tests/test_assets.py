"""The embedded model: stock, small, described, and drawn from prompts that do not overlap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "assets" / "pocket-image"

STOCK = """
import sys
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
picture = pipeline("red apple", num_inference_steps=2, use_resolution_binning=False, clean_caption=False).images[0]
assert picture.size == (128, 128), picture.size
assert not any(name.startswith(("trdq", "studio")) for name in sys.modules)
print(type(pipeline).__name__, type(pipeline.transformer).__name__, type(pipeline.vae).__name__)
"""


def test_it_loads_and_samples_with_no_code_of_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(POCKET)], cwd=POCKET, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["PixArtSigmaPipeline", "PixArtTransformer2DModel", "AutoencoderKL"]


def test_its_shape_is_the_agreed_one() -> None:
    config = json.loads((POCKET / "transformer" / "config.json").read_text())
    assert config["attention_head_dim"] == 64
    assert config["num_attention_heads"] * 64 % 128 == 0
    assert 8 <= config["num_layers"] <= 12


def test_weights_are_small_fp16_safetensors() -> None:
    files = [path for path in (ROOT / "assets").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 80e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in POCKET.rglob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                assert stored.get_tensor(name).dtype is torch.float16, f"{path.name}: {name}"


def test_prompts_for_calibration_and_evaluation_do_not_overlap() -> None:
    prompts = json.loads((ROOT / "assets" / "prompts.json").read_text())
    calibration, evaluation = prompts["calibration"], prompts["evaluation"]
    assert len(set(calibration)) == len(set(evaluation)) == 64
    assert not set(calibration) & set(evaluation)


@pytest.mark.parametrize("words", ["MIT", "Fluent", "recalls", "use_resolution_binning=False", "two CPU threads"])
def test_the_card_says_what_must_be_said(words: str) -> None:
    assert words in (POCKET / "README.md").read_text()
    assert (POCKET / "contact_sheet.png").stat().st_size > 10_000
