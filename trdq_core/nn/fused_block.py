"""The forward of a whole transformer block with adaptive norms, its norms, gates and residuals fused into the linears."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from trdq_core.kernels.surroundings import apply_epilogue, apply_prologue
from trdq_core.kernels.types import Epilogue, Prologue
from trdq_core.nn.few_rows import read_weights_once
from trdq_core.nn.fused import (
    Around,
    FusedAttention,
    FusedFeedForward,
    fuse_attention,
    fuse_feed_forward,
    runs_here,
)
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.text_projection import remember_text

KINDS = ("ada_norm_zero", "ada_norm_single")


class Modulation(NamedTuple):
    """What the timestep makes of a block: shifts, scales and gates of attention and feed-forward, each (items, channels)."""

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor


class FusedBlock:
    """Stands in for `forward` of a diffusers block whose norms are modulated by the timestep: DiT, PixArt, Latte.

    Attention or feed-forward that are not fused themselves, as a shared one, get their norm and residual from torch.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block, self.plain = block, block.forward

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The block's output (batch, tokens, channels)."""
        if cross_attention_kwargs or not runs_here(hidden_states) or not self.takes(hidden_states):
            return self.plain(
                hidden_states,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
                added_cond_kwargs=added_cond_kwargs,
            )
        block, x = self.block, hidden_states.contiguous()
        made = self._modulation(x, timestep, class_labels)
        first, second = norms_of(block)
        norm = Prologue("norm", made.attention_shift, made.attention_scale, first.eps)
        x = _attention(block.attn1, x, None, attention_mask, norm, made.attention_gate)
        if block.attn2 is not None:  # reads the residual stream itself in these models
            x = _attention(block.attn2, x, encoder_hidden_states, encoder_attention_mask, None, None)
        norm = Prologue("norm", made.shift, made.scale, second.eps)
        return _feed_forward(block.ff, x, norm, made.gate)

    def takes(self, x: Tensor) -> bool:
        """Whether at least one part of the block runs fused on inputs of the type of x."""
        block = self.block
        attentions = [part for part in (block.attn1, block.attn2) if part is not None]
        return any(_fused_attention(part, x) for part in attentions) or _fused_feed_forward(block.ff, x) is not None

    def _modulation(self, x: Tensor, timestep: Tensor | None, class_labels: Tensor | None) -> Modulation:
        block = self.block
        if block.norm_type == "ada_norm_single":
            assert timestep is not None  # the model computes it once for all blocks
            return Modulation(*(block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).unbind(1))
        norm = block.norm1
        embedded = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
        return Modulation(*norm.linear(norm.silu(embedded)).chunk(6, dim=1))


def _attention(
    attention: nn.Module,
    x: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    norm: Prologue | None,
    gate: Tensor | None,
) -> Tensor:
    added = Epilogue(x.flatten(0, 1), gate)
    fused = _fused_attention(attention, x)
    if fused is not None:
        return fused.attend(attention, x, context, mask, Around(norm, added))
    y = attention(_normed(x, norm), encoder_hidden_states=context, attention_mask=mask)
    return apply_epilogue(y.flatten(0, 1), added).view_as(x)


def _feed_forward(feed_forward: nn.Module, x: Tensor, norm: Prologue, gate: Tensor) -> Tensor:
    added = Epilogue(x.flatten(0, 1), gate)
    fused = _fused_feed_forward(feed_forward, x)
    if fused is not None:
        return fused.run(x, Around(norm, added))
    return apply_epilogue(feed_forward(_normed(x, norm)).flatten(0, 1), added).view_as(x)


def _fused_attention(attention: nn.Module, x: Tensor) -> FusedAttention | None:
    processor = getattr(attention, "processor", None)
    return processor if isinstance(processor, FusedAttention) and processor.takes(attention, x) else None


def _fused_feed_forward(feed_forward: nn.Module, x: Tensor) -> FusedFeedForward | None:
    forward = feed_forward.forward
    return forward if isinstance(forward, FusedFeedForward) and forward.takes(x) else None


def _normed(x: Tensor, norm: Prologue | None) -> Tensor:
    return x if norm is None else apply_prologue(x.flatten(0, 1), norm).view_as(x)


def norms_of(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The layer norms before attention and before the feed-forward."""
    if block.norm_type == "ada_norm_single":
        return block.norm1, block.norm2
    return block.norm1.norm, block.norm3


def _known(block: nn.Module) -> bool:
    """Whether the block is one that `FusedBlock` computes: modulated norms without weights, and nothing in between."""
    if getattr(block, "norm_type", None) not in KINDS or block.pos_embed is not None or hasattr(block, "fuser"):
        return False
    if block._chunk_size is not None or block.only_cross_attention:
        return False
    zero = block.norm_type == "ada_norm_zero"
    if zero and (block.attn2 is not None or block.norm1.emb is None):
        return False
    return all(type(norm) is nn.LayerNorm and not norm.elementwise_affine for norm in norms_of(block))


def fuse(denoiser: nn.Module) -> dict[str, int]:
    """Fuse what can be fused in a quantized denoiser, and how much that was: attentions, feed-forwards and whole blocks.

    Give it a copy whose linears are quantized already; weights and buffers stay where they are. What only depends on the
    text is remembered from step to step. To be called before attention is shared, since the shared processors hand over to
    the one that they find.
    """
    count = {"attentions": 0, "feed_forwards": 0, "blocks": 0}
    for block in list(denoiser.modules()):
        if not hasattr(block, "attn1") or not hasattr(block, "ff"):
            continue
        attentions = [part for part in (block.attn1, getattr(block, "attn2", None)) if part is not None]
        done = [fuse_attention(attention) for attention in attentions]
        fed = hasattr(block.ff, "net") and len(block.ff.net) == 3 and fuse_feed_forward(block.ff)
        count["attentions"] += sum(done)
        count["feed_forwards"] += fed
        if (fed or any(done)) and _known(block):
            block.forward = FusedBlock(block)
            count["blocks"] += 1
    if any(isinstance(module, QuantizedLinear) for module in denoiser.modules()):  # full precision stays what it was
        remember_text(denoiser)
        read_weights_once(denoiser)
    return count
