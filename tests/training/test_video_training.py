"""The video training stages in the small: no downloads, no trained weights, a few seconds."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image

from tests.tiny import tiny_video_pipeline
from training.autoencoder import build as build_autoencoder
from training.export_video import assemble, prompt_sets
from training.text_to_video import (
    DROPPED,
    FEWER,
    SPATIAL_RATE,
    Sampler,
    State,
    build,
    flow_loss,
    frames_of_step,
    learning_rate,
)
from training.video_data import (
    FRAMES,
    SIZE,
    STRIDE,
    WINDOWS,
    Clips,
    decode_frames,
    encode_frames,
    window_indices,
    windows_of,
)
from training.video_forward import Captions, predict
from training.video_retrieval import change, distance_to, pooled, rank_of_true, sheet

NAMES = ["bear", "cat", "dodo"]


@pytest.fixture(scope="module")
def picture() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=128, sample_size=16, patch_size=2, caption_channels=32, use_additional_conditions=False,
        interpolation_scale=1,
    )  # fmt: skip


def captions(count: int) -> Captions:
    kept = torch.ones(count, 5, dtype=torch.bool)
    kept[0, 3:] = False
    return Captions(torch.randn(count, 5, 32), kept)


def coloured(levels: list[int]) -> Clips:
    """Clips of one grey each, whose second window is ten grey levels lighter."""
    frames = np.zeros((len(levels), WINDOWS, FRAMES, SIZE, SIZE, 3), np.uint8)
    for number, level in enumerate(levels):
        frames[number, 0], frames[number, 1] = level, level + 10
    return Clips(frames, NAMES[: len(levels)], ["Animals & Nature"] * len(levels))


def test_windows_go_on_at_the_loop_s_beginning():
    indices = window_indices(72)
    assert indices.shape == (WINDOWS, FRAMES)
    assert indices[0].tolist() == list(range(0, FRAMES * STRIDE, STRIDE))
    assert indices[1, 0] == 36 and indices[1, -1] == (36 + 15 * STRIDE) % 72
    assert window_indices(33).max() < 33


def test_windows_are_cut_from_an_animation_on_white():
    frames = [Image.new("RGBA", (128, 128), (5 * number, 0, 0, 255)) for number in range(40)]
    frames = [*frames, Image.new("RGBA", (128, 128), (0, 0, 0, 0))]
    data = io.BytesIO()
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], lossless=True, exact=True, disposal=2)
    windows = windows_of(Image.open(data))
    assert windows.shape == (WINDOWS, FRAMES, SIZE, SIZE, 3)
    expected = np.array([[255 if i == 40 else 5 * i for i in window] for window in window_indices(41)])
    assert np.abs(windows[:, :, 32, 32, 0].astype(int) - expected).max() <= 1


def test_frames_survive_the_autoencoder_in_shape():
    vae = build_autoencoder().eval()
    frames = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    latents = encode_frames(vae, frames, batch=2)
    assert latents.shape == (3, 16, 8, 8) and latents.dtype == torch.float16
    assert decode_frames(vae, latents, batch=2).shape == frames.shape


def test_the_quick_forward_computes_what_the_stock_one_does(picture):
    model = build(picture, frames=6).eval()
    with torch.no_grad():
        for parameter in model.temporal_transformer_blocks.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        noisy, timestep, told = torch.randn(2, 4, 6, 8, 8), torch.tensor([100.0, 900.0]), captions(2)
        quick = predict(model, noisy, timestep, told, torch.arange(6))
        bias = torch.where(told.kept, 0.0, -10000.0)[:, None].repeat_interleave(6, dim=0)
        stock = model(
            noisy, timestep=timestep, encoder_hidden_states=told.embeddings, encoder_attention_mask=bias,
            return_dict=False,
        )[0]  # fmt: skip
    assert torch.allclose(quick, stock, atol=1e-4)
    assert stock.abs().mean() > 0.1


def test_temporal_blocks_begin_as_nothing(picture):
    model = build(picture, frames=6).eval()
    for name, value in picture.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.temp_pos_embed.zero_()
        noisy, told = torch.randn(2, 4, 3, 8, 8), captions(2)
        frames, timestep = torch.tensor([0, 2, 5]), torch.tensor([300.0, 600.0])
        together = predict(silent, noisy, timestep, told, frames)
        alone = [predict(silent, noisy[:, :, i : i + 1], timestep, told, frames[i : i + 1]) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone, dim=2), atol=1e-5)


def test_one_step_reaches_every_block_and_takes_any_frames(picture):
    model = build(picture, frames=FRAMES)
    sampler = Sampler(torch.randn(5, WINDOWS, FRAMES, 4, 8, 8).half(), captions(5), captions(1))
    for count in (FEWER, FRAMES):
        batch = sampler.draw(3, count)
        assert batch.latents.shape == (3, 4, count, 8, 8) and batch.frames.tolist() == sorted(
            set(batch.frames.tolist())
        )
        loss = flow_loss(model, batch)
        loss.backward()
        assert torch.isfinite(loss)
    for blocks in (model.transformer_blocks, model.temporal_transformer_blocks):
        assert all(block.ff.net[2].weight.grad.abs().sum() > 0 for block in blocks)


def test_captions_are_emptied_now_and_then_but_keep_their_length():
    told, empty = captions(1), Captions(torch.zeros(1, 5, 32), torch.ones(1, 5, dtype=torch.bool))
    sampler = Sampler(torch.zeros(1, WINDOWS, FRAMES, 4, 2, 2), told, empty)
    torch.manual_seed(0)
    batch = sampler.draw(2000, 1)
    emptied = (batch.captions.embeddings == 0).all(2).all(1)
    assert emptied.float().mean() == pytest.approx(DROPPED, abs=0.03)
    assert torch.equal(batch.captions.kept, told.kept.expand(2000, 5))


def test_the_pipeline_cuts_the_empty_prompt_as_training_does():
    pipeline = tiny_video_pipeline()
    pipeline.text_encoder.eval()  # its configuration has dropout
    with torch.no_grad():
        prompt, negative = pipeline.encode_prompt("red apple", clean_caption=False)
        tokens = pipeline.tokenizer([""], padding="max_length", max_length=8, return_tensors="pt")
        empty = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    assert prompt.shape[1] == negative.shape[1] == 3
    assert torch.allclose(negative, empty[:, :3], atol=1e-5)


def test_the_assembled_pipeline_is_stock_and_keeps_all_channels(picture):
    parts = tiny_video_pipeline()
    pipeline = assemble(build(picture, frames=4), parts.text_encoder, parts.tokenizer, parts.vae)
    assert type(pipeline).__module__.startswith("diffusers.")
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    clip = pipeline(
        "red apple", num_inference_steps=2, video_length=4, height=16, width=16, clean_caption=False, output_type="np"
    ).frames
    assert clip.shape == (1, 4, 16, 16, 3)


def test_a_stopped_run_goes_on_where_it_was(picture, tmp_path):
    file = tmp_path / "state.pt"
    first = State(NAMES, picture, file)
    sampler = Sampler(torch.randn(3, WINDOWS, FRAMES, 4, 8, 8).half(), captions(3), captions(1))
    first.learn(flow_loss(first.model, sampler.draw(2, FEWER)), 1e-3)
    first.seconds = 12.0
    first.save()
    again = State(NAMES, picture, file)
    assert (again.step, again.seconds) == (1, 12.0)
    for name, value in first.average.state_dict().items():
        assert torch.equal(again.average.state_dict()[name], value), name
    assert sorted({group["scale"] for group in again.optimizer.param_groups}) == [SPATIAL_RATE, 1.0]
    with pytest.raises(SystemExit, match="is of 3 other clips"):
        State(NAMES[:2], picture, file)


def test_the_schedule_ends_at_zero_with_whole_clips():
    assert learning_rate(0.0, 0) < learning_rate(0.1, 500) == learning_rate(0.3, 9000)
    assert learning_rate(1.0, 9000) < 1e-5
    assert {frames_of_step(0.1) for _ in range(100)} == {FEWER, FRAMES}
    assert {frames_of_step(progress) for progress in (0.71, 0.9, 1.0, 1.001)} == {FRAMES}


def test_a_clip_is_its_own_nearest_by_its_best_window():
    clips = coloured([0, 100, 200])
    generated = clips.frames[[1, 2], 1]
    assert pooled(generated).shape == (2, FRAMES * 32 * 32 * 3)
    ranks, nearest = rank_of_true(generated, clips.frames, [1, 2])
    assert ranks.tolist() == [0, 0] and nearest.tolist() == [1, 2]
    away = distance_to(generated, clips.frames)[0, 0]
    assert away == pytest.approx((110 - 10) / 255 * np.sqrt(FRAMES * 32 * 32 * 3), rel=1e-4)


def test_change_is_the_mean_step_between_frames():
    clip = np.zeros((2, FRAMES, 4, 4, 3), np.uint8)
    clip[1] = np.where(np.arange(FRAMES) % 2, 51, 0)[:, None, None, None]
    assert change(clip).tolist() == pytest.approx([0.0, 0.2])


def test_the_sheet_shows_every_clip(tmp_path):
    clips = coloured([0, 100, 200])
    sheet(clips.frames[:, 0], np.array([0, 1, 0]), [0, 1, 2], clips, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.getpixel((300, 10)) == (100, 100, 100) and picture.getpixel((300, 74)) == (100, 100, 100)


def test_prompts_for_calibration_and_evaluation_do_not_overlap():
    sets = prompt_sets([f"Thing {number}" for number in range(100)])
    assert len(sets["calibration"]) == len(sets["evaluation"]) == 32
    assert not set(sets["calibration"]) & set(sets["evaluation"])
