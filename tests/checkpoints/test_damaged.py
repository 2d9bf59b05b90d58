"""Every damaged or hostile checkpoint is refused with a sentence; nothing in it is executed, nothing hangs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from diffusers import PixArtTransformer2DModel

from tests.checkpoints.conftest import Convert
from tests.checkpoints.damage import KINDS, damaged
from trdq_core.adapters.saving import save_quantized
from trdq_core.errors import TRDQError
from trdq_core.presets import make_recipe

OURS = ("CheckpointError", "RecipeError")


@pytest.fixture(scope="module")
def intact(convert_tiny: Convert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = dataclasses.replace(make_recipe("tr-dq", weight_bits=4, groups=2), do_no_harm=False)
    folder = tmp_path_factory.mktemp("intact") / "model"
    save_quantized(convert_tiny(recipe), folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) >= 4
    return folder


def test_two_hundred_damaged_checkpoints_are_refused_with_a_sentence(intact: Path, tmp_path: Path) -> None:
    assert sum(count for count, _ in KINDS.values()) >= 200
    PixArtTransformer2DModel.from_pretrained(intact)  # so that the copies fail for their damage alone
    accepted, unclear, raised = [], [], Counter()
    for name, folder in damaged(intact, tmp_path, seed=7):
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
    assert not accepted
    assert not unclear
    assert not (tmp_path / "harmed").exists()
    assert sum(raised[kind] for kind in OURS) > 0.8 * raised.total(), raised
