"""Sampling in batches: the same pictures as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.adapters.random_dit import CLASSES, RandomDiT
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.errors import ShapeError
from trdq_core.kernels import dispatch
from trdq_core.metrics import sqnr_db
from trdq_core.presets import make_recipe, published_sharing, with_sharing
from trdq_core.sampling import Conditioning, join, sample, sample_batch

STEPS = 3
PROMPTS = ("red apple", "tiger face", "rocket")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_batch_gives_the_pictures_of_single_runs(model: PixArtModel, guidance: float) -> None:
    conditionings, seen = model.encode(PROMPTS), []
    settings = {"steps": STEPS, "guidance": guidance}
    latents = sample_batch(
        model, conditionings, [5, 6, 5], **settings, on_step=lambda step, t, value: seen.append((step, value.shape))
    )
    assert seen == [(step, latents.shape) for step in range(STEPS)]
    for index, (conditioning, seed) in enumerate(zip(conditionings, [5, 6, 5], strict=True)):
        alone = sample(model, conditioning, seed, **settings).latents[-1][0]
        assert sqnr_db(latents[index], alone) > 90, "float noise only"
    assert sqnr_db(latents[0], latents[2]) < 40, "prompts differ though the seed is the same"


@pytest.mark.parametrize("method", ["rtn", "tr-dq", "shared"])
def test_invariant_23_quantized_sampling_does_not_depend_on_the_batch(
    model: PixArtModel, method: str, tmp_path: Path
) -> None:
    statistics = calibrate(model, PROMPTS[:1], steps=STEPS, guidance=3.5, seed=0)
    recipe = make_recipe("rtn" if method == "shared" else method, weight_bits=4, activation_bits=8)
    if method == "shared":
        recipe = with_sharing(recipe, published_sharing(2))
    backend = dispatch.select_backend(torch.device("cpu"))
    changed = convert(model.denoiser, model.linears(), recipe, statistics, backend=backend, storage_folder=tmp_path)
    conditionings, settings = model.encode(PROMPTS), {"steps": STEPS, "guidance": 3.5}
    with model.using(changed.denoiser):
        latents = sample_batch(model, conditionings, [1, 2, 3], **settings)
        for index, conditioning in enumerate(conditionings):
            alone = sample(model, conditioning, index + 1, **settings).latents[-1][0]
            plain = sqnr_db(latents[index], alone)
            # An input on the border of two integers may fall to either side, which is a step of the grid and no more.
            assert plain > 50, f"{method}: prompt {index} differs by {plain:.1f} dB"


def test_joined_conditionings_are_rows_in_order() -> None:
    parts = [Conditioning(name, {"x": torch.full((1, 2), float(i))}) for i, name in enumerate("ab")]
    joined = join(parts)
    assert joined.prompt == "a; b"
    assert joined.tensors["x"].tolist() == [[0, 0], [1, 1]]


def test_the_random_dit_puts_unconditional_labels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = RandomDiT("random-dit"), []

    def denoiser(hidden_states: torch.Tensor, class_labels: torch.Tensor, **others: object) -> tuple[torch.Tensor]:
        seen.append(class_labels.tolist())
        return (hidden_states,)

    monkeypatch.setattr(model, "_active", denoiser)
    conditionings = model.encode(["a", "b"])
    assert sample_batch(model, conditionings, [0, 1], steps=2, guidance=2).shape == (2, 4, 32, 32)
    assert seen[0] == [CLASSES, CLASSES, ord("a"), ord("b")]


def test_embeddings_of_different_lengths_make_no_batch() -> None:
    parts = [Conditioning(str(tokens), {"prompt_embeds": torch.zeros(1, tokens, 4)}) for tokens in (3, 5)]
    with pytest.raises(ShapeError, match="prompt_embeds of '3' and '5' are of different lengths"):
        join(parts)
