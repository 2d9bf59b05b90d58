"""Stock PixArt-Sigma and Latte pipelines with random weights that sample in milliseconds. For plumbing, never for quality."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("<pad>", "</s>", "<unk>", "red", "apple", "tiger", "face", "green", "salad", "rocket")


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def _text_encoder() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


def tiny_pipeline(layers: int = 2) -> PixArtSigmaPipeline:
    """Width 128 (2 heads of 64), 16x16 pixels by an f2 autoencoder, 16 tokens; outlier channels that grow with time."""
    torch.manual_seed(0)
    tokenizer, encoder, vae = _tokenizer(), _text_encoder(), _autoencoder()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=layers,
        cross_attention_dim=128, sample_size=8, patch_size=2, caption_channels=32, use_additional_conditions=False,
        interpolation_scale=1,
    )  # fmt: skip
    with torch.no_grad():
        table = transformer.adaln_single.linear
        table.weight[4 * 128 :: 128].mul_(8)  # a few scale rows that depend strongly on the timestep
        transformer.proj_out.weight.mul_(0.2)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.5)
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def save_tiny(folder: Path) -> Path:
    """Save the tiny pipeline as a diffusers folder."""
    tiny_pipeline().save_pretrained(folder)
    return folder


def tiny_video_pipeline(layers: int = 2, frames: int = 4, width: int = 128) -> LattePipeline:
    """A Latte of 2 heads: clips of 4 frames, 16x16 pixels by the same f2 autoencoder, 16 tokens a frame."""
    torch.manual_seed(0)
    tokenizer, encoder, vae = _tokenizer(), _text_encoder(), _autoencoder()
    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=width // 2, in_channels=4, out_channels=4, num_layers=layers,
        cross_attention_dim=width, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=32, video_length=frames,
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.mul_(0.2)
    # Without a variance type Latte's pipeline takes the second half of the channels for a variance and drops it.
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.5, variance_type="learned"
    )
    return LattePipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def save_tiny_video(folder: Path, width: int = 128) -> Path:
    """Save the tiny Latte pipeline as a diffusers folder."""
    tiny_video_pipeline(width=width).save_pretrained(folder)
    return folder
