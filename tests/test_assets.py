"""The embedded models: stock, small, described, and drawn from prompts that do not overlap."""

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
VIDEO = ROOT / "assets" / "pocket-video"

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


STOCK_VIDEO = """
import sys
import numpy as np
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
sizes = dict(video_length=16, height=64, width=64)
frames = pipeline("bear", num_inference_steps=2, clean_caption=False, output_type="np", **sizes).frames
assert frames.shape == (1, 16, 64, 64, 3) and np.isfinite(frames).all(), frames.shape
assert not any(name.startswith(("trdq", "studio")) for name in sys.modules)
print(type(pipeline).__name__, type(pipeline.transformer).__name__, type(pipeline.vae).__name__)
"""


@pytest.mark.parametrize(
    ("folder", "code", "classes"),
    [
        (POCKET, STOCK, "PixArtSigmaPipeline PixArtTransformer2DModel AutoencoderKL"),
        (VIDEO, STOCK_VIDEO, "LattePipeline LatteTransformer3DModel AutoencoderKL"),
    ],
    ids=["image", "video"],
)
def test_it_loads_and_samples_with_no_code_of_ours(folder: Path, code: str, classes: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == classes


def test_its_shape_is_the_agreed_one() -> None:
    config = json.loads((POCKET / "transformer" / "config.json").read_text())
    assert config["attention_head_dim"] == 64
    assert config["num_attention_heads"] * 64 % 128 == 0
    assert 8 <= config["num_layers"] <= 12


def test_weights_are_small_fp16_safetensors() -> None:
    files = [path for path in (ROOT / "assets").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 80e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in (ROOT / "assets").rglob("*.safetensors"):
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


def test_the_video_model_reads_prompts_as_the_picture_model_does() -> None:
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        assert (VIDEO / name).read_bytes() == (POCKET / name).read_bytes(), name
    image, video = (json.loads((f / "transformer" / "config.json").read_text()) for f in (POCKET, VIDEO))
    for key in ("num_attention_heads", "attention_head_dim", "num_layers", "cross_attention_dim", "in_channels"):
        assert image[key] == video[key], key
    assert video["video_length"] == 16 and video["sample_size"] == 8


def test_video_prompts_are_trained_names_that_do_not_overlap() -> None:
    prompts, facts = (json.loads((VIDEO / name).read_text()) for name in ("prompts.json", "training.json"))
    assert len(set(prompts["calibration"])) == len(set(prompts["evaluation"])) == 32
    assert not set(prompts["calibration"]) & set(prompts["evaluation"])
    assert {*prompts["calibration"], *prompts["evaluation"]} <= {name.lower() for name in facts["names"]}


def test_the_video_model_knows_its_clips_and_moves_like_them() -> None:
    guided = json.loads((VIDEO / "score.json").read_text())["guided"]
    assert guided["top1"] >= 0.45
    assert 0.5 <= guided["change_ratio"] <= 2


@pytest.mark.parametrize(
    "words", ["MIT", "Fluent", "recalls", "clean_caption=False", "one prompt at a time", "one CPU core"]
)
def test_the_video_card_says_what_must_be_said(words: str) -> None:
    assert words in (VIDEO / "README.md").read_text()
    assert (VIDEO / "contact_sheet.png").stat().st_size > 10_000
