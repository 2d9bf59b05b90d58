"""Latte's forward pass on any of its frames, with what the frames of a clip share computed once. For training only.

The stock forward repeats a clip's caption and its timestep for each frame and each patch, and takes exactly as many
frames as it has temporal positions. This one computes the same numbers from the same modules (a test compares them).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor


class Captions(NamedTuple):
    """Text embeddings (count, length, width) and which of them are attended to (count, length), bool."""

    embeddings: Tensor
    kept: Tensor


def _attend(attention: torch.nn.Module, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of (count, tokens, width) to (count, context tokens, width)."""
    count, tokens, width = queries.shape
    heads = attention.heads

    def split(values: Tensor) -> Tensor:
        return values.reshape(count, -1, heads, width // heads).transpose(1, 2)

    # Written out: for a handful of tokens the fused kernel's backward costs more than all the rest of the block.
    keys, values = split(attention.to_k(context)), split(attention.to_v(context))
    scores = (split(attention.to_q(queries)) * attention.scale) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    mixed = scores.softmax(-1).to(values.dtype) @ values
    return attention.to_out[0](mixed.transpose(1, 2).reshape(count, tokens, width))


def _block(
    block: BasicTransformerBlock, hidden: Tensor, modulation: Tensor, context: Tensor | None, mask: Tensor | None
) -> Tensor:
    """One block on (clips, groups, tokens, width): attention inside each group, everything else token by token."""
    clips, groups, tokens, width = hidden.shape
    parts = (block.scale_shift_table[None] + modulation.reshape(clips, 6, width)).unsqueeze(2).chunk(6, dim=1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts
    normed = block.norm1(hidden) * (1 + scale_attention) + shift_attention
    flat = normed.reshape(clips * groups, tokens, width)
    hidden = hidden + gate_attention * _attend(block.attn1, flat, flat).reshape(hidden.shape)
    if context is not None:
        across = _attend(block.attn2, hidden.reshape(clips, groups * tokens, width), context, mask)
        hidden = hidden + across.reshape(hidden.shape)
    normed = block.norm2(hidden) * (1 + scale_mlp) + shift_mlp
    return hidden + gate_mlp * block.ff(normed)


def predict(
    transformer: LatteTransformer3DModel, noisy: Tensor, timestep: Tensor, captions: Captions, frames: Tensor
) -> Tensor:
    """What the transformer says of latents (clips, channels, count, height, width), which are the `frames` of a clip.

    `timestep` (clips,) runs from 0 to 1000, `frames` (count,) are frame numbers. Returns the latents' shape.
    """
    clips, channels, count, height, width = noisy.shape
    patch = transformer.config.patch_size
    hidden = transformer.pos_embed(noisy.transpose(1, 2).reshape(-1, channels, height, width))
    hidden = hidden.reshape(clips, count, -1, hidden.shape[-1])
    nothing = {"resolution": None, "aspect_ratio": None}
    modulation, embedded = transformer.adaln_single(
        timestep, added_cond_kwargs=nothing, batch_size=clips, hidden_dtype=hidden.dtype
    )
    context = transformer.caption_projection(captions.embeddings)
    mask = captions.kept[:, None, None, :]
    layers = zip(transformer.transformer_blocks, transformer.temporal_transformer_blocks, strict=True)
    for i, (spatial, temporal) in enumerate(layers):
        hidden = _block(spatial, hidden, modulation, context, mask).transpose(1, 2)
        if i == 0:
            hidden = hidden + transformer.temp_pos_embed[0, frames]
        hidden = _block(temporal, hidden, modulation, None, None).transpose(1, 2)
    shift, scale = (transformer.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    hidden = transformer.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
    values = transformer.proj_out(hidden)
    values = values.reshape(clips, count, height // patch, width // patch, patch, patch, -1)
    return torch.einsum("bfhwpqc->bcfhpwq", values).reshape(clips, -1, count, height, width)
