"""Every damaged or hostile checkpoint is refused with a sentence; nothing in it is executed, nothing hangs."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, PixArtTransformer2DModel

from tests.checkpoints.conftest import Convert
from tests.checkpoints.damage import KINDS, damaged
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.saving import Saved, save_quantized
from trdq_core.checkpoints.before import check_before_loading, weight_files
from trdq_core.errors import CheckpointError, TRDQError
from trdq_core.presets import make_recipe, parse_recipe

OURS = ("CheckpointError", "RecipeError")
LONGEST = 3.0  # seconds of this process for one folder; the costly ones would take a minute
MOST_MEMORY = 256 << 20  # bytes for all of them together; a costly one would take ten thousand million


@pytest.fixture(scope="module")
def intact(convert_tiny: Convert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = dataclasses.replace(make_recipe("tr-dq", weight_bits=4, groups=2), do_no_harm=False)
    folder = tmp_path_factory.mktemp("intact") / "model"
    save_quantized(convert_tiny(recipe), folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) >= 4
    return folder


def peak() -> int:
    """The most bytes this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_two_hundred_damaged_checkpoints_are_refused_with_a_sentence(intact: Path, tmp_path: Path) -> None:
    assert sum(count for count, _ in KINDS.values()) >= 200
    PixArtTransformer2DModel.from_pretrained(intact)  # so that the copies fail for their damage alone
    accepted, unclear, slow, raised, before = [], [], [], Counter(), peak()
    for name, folder in damaged(intact, tmp_path, seed=7):
        started = time.process_time()
        try:
            PixArtTransformer2DModel.from_pretrained(folder)
            accepted.append(name)
        except Exception as error:
            raised[type(error).__name__] += 1
            text = str(error)
            if isinstance(error, TRDQError) and not (text.endswith(".") and "\n" not in text and len(text) < 400):
                unclear.append(f"{name}: {text}")
            if not isinstance(error, (TRDQError, OSError, ValueError)):
                unclear.append(f"{name}: {type(error).__name__} {text[:200]}")
        if time.process_time() - started > LONGEST:
            slow.append(name)
    assert not accepted
    assert not unclear
    assert not slow
    assert peak() - before < MOST_MEMORY
    assert not (tmp_path / "harmed").exists()
    assert sum(raised[kind] for kind in OURS) > 0.8 * raised.total(), raised


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_lost_its_word_of_quantization_is_not_loaded_as_random_layers(
    whole: bool, intact: Path, convert_tiny: Convert, save: Callable[..., Saved], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    part = folder / "transformer" if whole else folder
    if whole:
        save(convert_tiny(parse_recipe("rtn-w8a8")), folder)
    else:
        shutil.copytree(intact, folder)
    data = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({k: v for k, v in data.items() if k != "quantization_config"}))
    with pytest.raises(CheckpointError, match="quantization_config in config.json does not say so; copy the folder"):
        DiffusionPipeline.from_pretrained(folder) if whole else PixArtTransformer2DModel.from_pretrained(folder)


def test_other_folders_are_left_to_diffusers(model: PixArtModel, tmp_path: Path) -> None:
    model.denoiser.save_pretrained(tmp_path / "full", max_shard_size="200KB")
    assert len(weight_files(tmp_path / "full")) > 1
    check_before_loading(tmp_path / "full", "AnyClass")
    model.denoiser.save_pretrained(tmp_path / "variant", variant="fp16")
    assert weight_files(tmp_path / "variant") == []
    assert [file.name for file in weight_files(tmp_path / "variant", "fp16")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    with pytest.raises(OSError, match="config.json"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)
