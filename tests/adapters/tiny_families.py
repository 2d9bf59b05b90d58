"""A tiny pipeline of random weights for each family: width 64 (96 for Z-Image), one or two blocks, 8x8 latents or less.

For plumbing, never for quality. They have no text encoder, prompts come as random embeddings (`embeddings_of`), unless
`with_text` gives them one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests import tiny

WIDTH, TEXT, TOKENS = 64, 32, 6
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
PIXELS = {"height": 64, "width": 64}
CLIP = {**PIXELS, "frames": 5}
FLOW = (FlowMatchEulerDiscreteScheduler, {})


class Tiny(NamedTuple):
    """How to build one family: classes by name, the transformer's configuration, scheduler, embeddings by name and shape."""

    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    embeddings: Mapping[str, tuple[int, ...]]
    size: Mapping[str, int]
    scheduler: tuple[type, Mapping[str, Any]] = FLOW
    masks: tuple[str, ...] = ()
    vae: bool = False  # whether there is an autoencoder, so that latents can be decoded


FAMILIES: Mapping[str, Tiny] = {
    "dit": Tiny(
        "DiTPipeline", "DiTTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 1000},
        {}, {}, (DDIMScheduler, {}), vae=True,
    ),
    "pixart-alpha": Tiny(
        "PixArtAlphaPipeline", "PixArtTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": WIDTH, "sample_size": 8,
         "caption_channels": TEXT, "use_additional_conditions": False},
        {"prompt_embeds": (TOKENS, TEXT)}, {}, (DPMSolverMultistepScheduler, {}), ("prompt_attention_mask",), vae=True,
    ),
    "pixart-sigma": Tiny(
        "PixArtSigmaPipeline", "PixArtTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": WIDTH, "sample_size": 8,
         "caption_channels": TEXT, "use_additional_conditions": False},
        {"prompt_embeds": (TOKENS, TEXT)}, {}, (DPMSolverMultistepScheduler, {}), ("prompt_attention_mask",), vae=True,
    ),
    "sd3": Tiny(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": TEXT,
         "caption_projection_dim": WIDTH, "pooled_projection_dim": 64},
        {"prompt_embeds": (TOKENS, TEXT), "pooled_prompt_embeds": (64,)}, PIXELS, vae=True,
    ),
    "sd3.5": Tiny(  # a second self-attention in the first block, norms on queries and keys
        "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": TEXT,
         "caption_projection_dim": WIDTH, "pooled_projection_dim": 64, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        {"prompt_embeds": (TOKENS, TEXT), "pooled_prompt_embeds": (64,)}, PIXELS,
    ),
    "flux": Tiny(
        "FluxPipeline", "FluxTransformer2DModel",
        {**HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12)},
        {"prompt_embeds": (TOKENS, TEXT), "pooled_prompt_embeds": (32,)}, PIXELS, vae=True,
    ),
    "flux-true-guidance": Tiny(
        "FluxPipeline", "FluxTransformer2DModel",
        {**HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT,
         "pooled_projection_dim": 32, "guidance_embeds": False, "axes_dims_rope": (8, 12, 12)},
        {"prompt_embeds": (TOKENS, TEXT), "pooled_prompt_embeds": (32,)}, PIXELS,
    ),
    "sana": Tiny(
        "SanaPipeline", "SanaTransformer2DModel",
        {**HEADS, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 32, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "sample_size": 8},
        {"prompt_embeds": (TOKENS, TEXT)}, {"height": 256, "width": 256}, masks=("prompt_attention_mask",),
    ),
    "hunyuan-dit": Tiny(
        "HunyuanDiTPipeline", "HunyuanDiT2DModel",
        {**HEADS, "sample_size": 8, "num_layers": 4, "patch_size": 2, "in_channels": 4, "cross_attention_dim": TEXT,
         "cross_attention_dim_t5": TEXT, "pooled_projection_dim": 32, "hidden_size": WIDTH, "text_len": TOKENS,
         "text_len_t5": TOKENS, "activation_fn": "gelu-approximate"},
        {"prompt_embeds": (TOKENS, TEXT), "prompt_embeds_2": (TOKENS, TEXT)}, PIXELS, (DDPMScheduler, {}),
        ("prompt_attention_mask", "prompt_attention_mask_2"),
    ),
    "lumina2": Tiny(
        "Lumina2Pipeline", "Lumina2Transformer2DModel",
        {"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 1, "num_refiner_layers": 1,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32, "axes_dim_rope": (8, 12, 12),
         "axes_lens": (64, 16, 16), "cap_feat_dim": TEXT},
        {"prompt_embeds": (TOKENS, TEXT)}, PIXELS, masks=("prompt_attention_mask",), vae=True,
    ),
    "auraflow": Tiny(
        "AuraFlowPipeline", "AuraFlowTransformer2DModel",
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "joint_attention_dim": TEXT, "caption_projection_dim": WIDTH, "pos_embed_max_size": 64},
        {"prompt_embeds": (TOKENS, TEXT)}, PIXELS, masks=("prompt_attention_mask",), vae=True,
    ),
    "cogview4": Tiny(
        "CogView4Pipeline", "CogView4Transformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": TEXT, "time_embed_dim": 32,
         "condition_dim": 32, "sample_size": 8, "rope_axes_dim": (16, 16)},
        {"prompt_embeds": (16, TEXT)}, PIXELS,
        (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True, "time_shift_type": "linear"}), vae=True,
    ),
    "qwen-image": Tiny(
        "QwenImagePipeline", "QwenImageTransformer2DModel",
        {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": TEXT,
         "axes_dims_rope": (8, 12, 12)},
        {"prompt_embeds": (TOKENS, TEXT)}, PIXELS, masks=("prompt_embeds_mask",),
    ),
    "z-image": Tiny(
        "ZImagePipeline", "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 96, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3,
         "cap_feat_dim": TEXT, "axes_dims": [8, 12, 12], "axes_lens": [64, 16, 16]},
        {"prompt_embeds": (TOKENS, TEXT)}, PIXELS,
    ),
    "latte": Tiny(
        "LattePipeline", "LatteTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": WIDTH, "attention_bias": True,
         "sample_size": 8, "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
         "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "caption_channels": TEXT, "video_length": 2},
        {"prompt_embeds": (TOKENS, TEXT)}, {**PIXELS, "frames": 2}, (DDIMScheduler, {}), vae=True,
    ),
    "cogvideox": Tiny(
        "CogVideoXPipeline", "CogVideoXTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32, "text_embed_dim": TEXT, "num_layers": 1,
         "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TOKENS},
        {"prompt_embeds": (TOKENS, TEXT)}, CLIP, (CogVideoXDDIMScheduler, {}),
    ),
    "wan": Tiny(
        "WanPipeline", "WanTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 96, "num_layers": 1,
         "rope_max_seq_len": 32},
        {"prompt_embeds": (TOKENS, TEXT)}, CLIP,
    ),
    "ltx": Tiny(
        "LTXPipeline", "LTXVideoTransformer3DModel",
        {**HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "num_layers": 1, "caption_channels": TEXT},
        {"prompt_embeds": (TOKENS, TEXT)}, {"height": 128, "width": 128, "frames": 9}, masks=("prompt_attention_mask",),
    ),
    "hunyuan-video": Tiny(
        "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
         "patch_size": 2, "patch_size_t": 1, "text_embed_dim": TEXT, "pooled_projection_dim": 32,
         "rope_axes_dim": (8, 12, 12)},
        {"prompt_embeds": (TOKENS, TEXT), "pooled_prompt_embeds": (32,)}, CLIP, masks=("prompt_attention_mask",),
    ),
}  # fmt: skip


def autoencoder() -> AutoencoderKL:
    """An f8 autoencoder of 4 latent channels."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def build(name: str) -> DiffusionPipeline:
    """The tiny pipeline of a family; the same weights every time."""
    tiny = FAMILIES[name]
    torch.manual_seed(0)
    transformer = getattr(diffusers, tiny.transformer)(**tiny.config)
    with torch.no_grad():
        for linear in transformer.modules():
            if isinstance(linear, nn.Linear) and not linear.weight.any():
                nn.init.xavier_uniform_(
                    linear.weight
                )  # zero at the start of training: nothing would depend on anything
    kind = getattr(diffusers, tiny.pipeline)
    scheduler, settings = tiny.scheduler
    parts = {"transformer": transformer, "scheduler": scheduler(**settings), "vae": autoencoder() if tiny.vae else None}
    taken = inspect.signature(kind.__init__).parameters
    absent = {part: None for part, one in taken.items() if one.default is one.empty and part not in (*parts, "self")}
    if "requires_safety_checker" in taken:
        absent["requires_safety_checker"] = False
    return kind(**absent, **parts)


def embeddings_of(name: str, prompt: str) -> dict[str, Tensor]:
    """Random embeddings of a prompt and of the empty one, by the names of the pipeline's call."""
    tiny = FAMILIES[name]
    generator = torch.Generator().manual_seed(sum(prompt.encode()))
    if not tiny.embeddings:
        return {"class_labels": torch.tensor([sum(prompt.encode()) % 1000])}
    given = {}
    for branch in ("", "negative_"):
        for key, shape in tiny.embeddings.items():
            given[f"{branch}{key}"] = torch.randn(1, *shape, generator=generator)
        for key in tiny.masks:
            mask = torch.ones(1, TOKENS, dtype=torch.int64)
            mask[:, TOKENS - 2 :] = 0  # padding
            given[f"{branch}{key}"] = mask
    return given


def with_text(name: str) -> DiffusionPipeline:
    """A tiny pipeline that reads words: T5, for FLUX a CLIP text model besides."""
    pipeline = build(name)
    torch.manual_seed(0)
    tokenizer, encoder = tiny._tokenizer(), tiny._text_encoder().eval()
    if name.startswith("flux"):
        config = CLIPTextConfig(
            vocab_size=len(tiny.WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, projection_dim=32, eos_token_id=1, pad_token_id=0, bos_token_id=0,
        )  # fmt: skip
        clip = CLIPTextModel(config).eval()
        pipeline.register_modules(tokenizer_2=tokenizer, text_encoder_2=encoder, tokenizer=tokenizer, text_encoder=clip)
        pipeline.tokenizer_max_length = 8
    else:
        pipeline.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    return pipeline
