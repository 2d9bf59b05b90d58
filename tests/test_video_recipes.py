"""Every recipe on a tiny Latte: calibrated, converted and sampled, with nothing said of video in the recipe."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_video_pipeline
from trdq_core.adapters.latte import LatteModel
from trdq_core.attention_products import attentions
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion, convert
from trdq_core.errors import CalibrationError
from trdq_core.model_passes import make_passes
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.modules import share_copy
from trdq_core.presets import METHODS, parse_recipe, with_sharing
from trdq_core.sampling import Conditioning, sample, sample_batch
from trdq_core.sharing import self_attentions
from trdq_core.sharing_plans import store_bytes_of_block
from trdq_core.similarity import FILES, TEMPORAL, Similarity, measure_similarity
from trdq_core.specs import Recipe, SharingSpec
from trdq_core.statistics import Statistics

STEPS, FRAMES, PATCHES = 2, 4, 16
PROMPTS = ("tiger", "green salad")  # two and three tokens: Latte cuts each text to its own
WIDE = ("svdquant", "q-dit", "tr-dq-plus-low-rank")  # their groups of 64 and 128 channels need a width of 128


class Subject(NamedTuple):
    """A model with its calibration."""

    model: LatteModel
    statistics: Statistics
    folder: Path

    def convert(self, recipe: Recipe) -> Conversion:
        """A quantized denoiser, all passes over the model at hand; learnt rounding is cut short."""
        if recipe.reconstruction is not None:
            quick = dataclasses.replace(recipe.reconstruction, iterations=4, batch=2)
            recipe = dataclasses.replace(recipe, reconstruction=quick)
        model = self.model
        passes = make_passes(
            model, self.statistics, recipe, folder=self.folder, seed=0, announce=lambda stage, label: None,
            on_event=lambda event: None, cancelled=None,
        )  # fmt: skip
        return convert(
            model.denoiser, model.linears(), recipe, self.statistics, backend="reference", storage_folder=self.folder,
            argument=model.timestep_argument, passes=passes,
        )  # fmt: skip

    def latents(self, conditioning: Conditioning, changed: Conversion | None = None) -> Tensor:
        """What it samples, in full precision or changed."""
        with self.model.using(changed.denoiser if changed is not None else self.model.denoiser):
            return sample(self.model, conditioning, 0, steps=STEPS, guidance=3.0).latents[-1]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    """A subject of some width; each is made once."""

    @cache
    def make(width: int = 32) -> Subject:
        folder = tmp_path_factory.mktemp("video")
        tiny_video_pipeline(layers=2 if width == 32 else 1, width=width).save_pretrained(folder / "tiny")
        model = LatteModel(folder / "tiny")
        return Subject(model, calibrate(model, PROMPTS, steps=STEPS, guidance=3.0, seed=0), folder)

    return make


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fp"])
def test_every_method_runs_on_clips(method: str, subject: Callable[..., Subject]) -> None:
    made = subject(128 if method in WIDE else 32)
    recipe = parse_recipe(f"{method}-w4a8", groups=2 if METHODS[method].time_grouped else 1)
    changed = made.convert(recipe)
    quantized, layers = changed.quantized_layers(), made.model.linears()
    roles = {layer.role for layer in layers if layer.name in quantized}
    assert {"self_q", "cross_k", "mlp_out", "temporal_q", "temporal_out", "temporal_mlp_out"} <= roles
    conditioning = made.model.encode(["tiger"])[0]
    reference, latents = made.latents(conditioning), made.latents(conditioning, changed)
    assert latents.shape == (1, 4, FRAMES, 8, 8)
    error = float((latents - reference).square().sum() / reference.square().sum())
    assert 0 < error < 0.5, f"{10 * math.log10(1 / error):.1f} dB"
    if recipe.attention is not None:
        found = changed.facts()["attention"]
        asked = len(attentions(layers, cross=recipe.attention.cross))
        # Int8 products are those of the C++ kernels; this backend has none of them, and says so.
        assert found["attentions"] == (0 if recipe.attention.live else asked)
        assert not recipe.attention.live or found["exact"] == asked
        assert found["calls"] == STEPS * found["attentions"]
    if recipe.reconstruction is not None:
        units = [unit for unit in changed.facts()["reconstruction"]["units"] if unit["kind"] == "block"]
        assert [unit["unit"] for unit in units] == [
            f"{name}.{block}" for block in (0, 1) for name in ("transformer_blocks", "temporal_transformer_blocks")
        ], "each behind those before it"
        assert all(0 < unit["error_nearest"] < 1 for unit in units)


def test_a_clip_counts_as_one_item_of_each_branch(subject: Callable[..., Subject]) -> None:
    statistics = subject().statistics
    for name, layer in statistics.layers.items():
        if "blocks" in name:
            assert layer.item_absmax.shape[:2] == (STEPS, 2 * len(PROMPTS)), name
            assert layer.rows.shape[1] == 16 * len(PROMPTS)
            seen = layer.rows.float().abs().amax(1)
            assert (seen <= layer.absmax_over_time()).all(), "the range is over all frames and patches"


def test_scales_are_of_one_position_of_one_item(subject: Callable[..., Subject]) -> None:
    """What else is in the batch changes nothing: neither another clip nor another frame or patch."""
    made = subject()
    changed = made.convert(parse_recipe("tr-dq-w4a8", groups=2))
    for name in ("transformer_blocks.0.ff.net.2", "temporal_transformer_blocks.0.attn1.to_q"):
        linear = changed.denoiser.get_submodule(name)
        assert isinstance(linear, QuantizedLinear)
        x = torch.randn(6, FRAMES, linear.in_features, generator=torch.Generator().manual_seed(0))
        x *= torch.logspace(0, 3, 6)[:, None, None]
        alone = torch.stack([torch.stack([linear(row[None])[0] for row in item]) for item in x])
        assert torch.equal(linear(x), alone)


def test_two_clips_in_one_batch_are_those_of_two_runs(subject: Callable[..., Subject]) -> None:
    made = subject()
    changed = made.convert(parse_recipe("rtn-w4a8"))
    conditionings = made.model.encode(["tiger", "rocket"])  # of one length
    with made.model.using(changed.denoiser):
        both = sample_batch(made.model, conditionings, [0, 0], steps=STEPS, guidance=3.0)
    for index, conditioning in enumerate(conditionings):
        assert torch.allclose(both[index : index + 1], made.latents(conditioning, changed), atol=1e-3)


def test_only_spatial_attention_is_shared(subject: Callable[..., Subject]) -> None:
    made = subject()
    blocks = self_attentions(made.model.linears())
    assert blocks == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    changed = made.convert(with_sharing(parse_recipe("rtn-w8a8"), SharingSpec(blocks=((0, 1),))))
    conditioning = made.model.encode(["tiger"])[0]
    assert torch.isfinite(made.latents(conditioning, changed)).all()
    assert changed.facts()["sharing"]["shared_calls"] == STEPS * len(blocks)
    for block in (0, 1):
        temporal = changed.denoiser.get_submodule(f"temporal_transformer_blocks.{block}.attn1")
        assert type(temporal.processor).__name__ == "AttnProcessor2_0"


def test_similarity_counts_the_tokens_of_all_frames(subject: Callable[..., Subject]) -> None:
    made = subject()
    similarity = measure_similarity(made.model, PROMPTS, steps=STEPS, guidance=3.0, seed=0)
    assert similarity.block_error.shape == (STEPS, 2)
    assert (similarity.about["tokens"], similarity.about["frames"]) == (PATCHES, FRAMES)
    assert store_bytes_of_block(similarity) == 2 * FRAMES * PATCHES * 32 * 4


def test_attention_across_frames_is_measured_beside(subject: Callable[..., Subject], tmp_path: Path) -> None:
    """Temporal numbers against whole maps of the very input, computed apart for the two halves of the call."""
    made, seen = subject(), []
    whole = measure_similarity(made.model, PROMPTS[:1], steps=STEPS, guidance=3.0, seed=0)
    copy = share_copy(made.model.denoiser)
    attention = copy.get_submodule("temporal_transformer_blocks.1.attn1")
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with made.model.using(copy):
        sample(made.model, made.model.encode(PROMPTS[:1])[0], 0, steps=STEPS, guidance=3.0)
    whole.save(tmp_path)
    temporal = Similarity.load(tmp_path).temporal
    assert temporal is not None and temporal.timesteps == whole.timesteps
    assert temporal.about["blocks"] == [f"temporal_transformer_blocks.{block}.attn1" for block in (0, 1)]
    assert (temporal.about["tokens"], temporal.about["patches"]) == (FRAMES, PATCHES)
    assert store_bytes_of_block(temporal) == store_bytes_of_block(whole), "the same numbers, seen the other way"
    for step, x in enumerate(seen):
        assert x.shape == (2 * PATCHES, FRAMES, 32)
        q, k, v = (
            linear(x).unflatten(-1, (attention.heads, -1)).permute(2, 0, 1, 3).double()
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        maps = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        own, other, values = maps[:, PATCHES:], maps[:, :PATCHES], v[:, :PATCHES]
        cosine = torch.nn.functional.cosine_similarity(own.flatten(1), other.flatten(1))
        lost, kept = (own - other) @ values, other @ values
        assert torch.allclose(temporal.map_cosine[step, 1].double(), cosine, atol=1e-6)
        per_head = lost.flatten(1).norm(dim=1) / kept.flatten(1).norm(dim=1)
        assert torch.allclose(temporal.output_error[step, 1].double(), per_head, rtol=1e-3)
        assert float(temporal.block_error[step, 1]) == pytest.approx(float(lost.norm() / kept.norm()), rel=1e-3) != 0
    assert torch.isnan(temporal.step_error[0]).all() and (temporal.step_error[1:] > 0).all()


def test_clips_measured_before_open_without_temporal_blocks(subject: Callable[..., Subject], tmp_path: Path) -> None:
    whole = measure_similarity(subject().model, PROMPTS[:1], steps=1, guidance=3.0, seed=0)
    assert whole.temporal is not None
    whole.save(tmp_path)
    (tmp_path / TEMPORAL / FILES[0]).write_bytes(b"x")
    with pytest.raises(CalibrationError, match="similarity temporal: damaged .* measure it again"):
        Similarity.load(tmp_path)
    shutil.rmtree(tmp_path / TEMPORAL)
    old = Similarity.load(tmp_path)
    assert old.temporal is None and torch.equal(old.block_error, whole.block_error)
