"""Attention whose two products take quantized operands: softmax(Q(q) Q(k)^T / sqrt(d) + mask), and Q of that times Q(v).

The grids are static, one scale for each head (TQ-DiT, arXiv 2502.04056; PTQ4DiT, arXiv 2405.16005), so the result of an item
does not depend on what else is in the batch. Computed in floating point: the numbers of an integer kernel, not its speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.nn.attention import PLAIN_PROCESSORS, Map, Projections, additive_mask, finish
from trdq_core.numerics.affine import QParams, fake_quantize
from trdq_core.numerics.twin_region import SoftmaxGrid
from trdq_core.timegroups import TimeContext, TimeGroups

CHUNK_BYTES = 1 << 26  # of scores held at a time


@dataclass(frozen=True)
class AttentionGrids:
    """The static grids of one attention. Scales are (heads,) fp32.

    `thresholds`: where the two regions of the softmax grid meet, one for each of `groups`; empty: uniform on [0, 1].
    """

    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    bits: int
    softmax_bits: int
    thresholds: tuple[float, ...] = ()
    groups: TimeGroups = field(default_factory=TimeGroups)

    def __post_init__(self) -> None:
        if len(self.thresholds) not in (0, self.groups.count):
            raise CalibrationError(
                f"attention: got {len(self.thresholds)} softmax thresholds for {self.groups.count} time groups; "
                "give one a group, or none for a uniform grid."
            )

    @property
    def heads(self) -> int:
        """How many heads there are scales for."""
        return len(self.q_scale)

    def threshold(self, timestep: float) -> float | None:
        """The threshold at a timestep; None where the softmax grid is uniform."""
        return self.thresholds[self.groups.group_of(timestep)] if self.thresholds else None


def quantize_heads(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x (..., heads, tokens, width) fp32 on the symmetric grid of its head, scales (heads,)."""
    return fake_quantize(x, QParams(scale.to(x.device)[:, None, None], None), bits=bits)


def quantize_map(probabilities: Tensor, bits: int, threshold: float | None) -> Tensor:
    """Probabilities on their grid, zero exactly at zero: uniform on [0, 1], or twin-region where a threshold is given."""
    if threshold is None:
        top = 2**bits - 1
        return (probabilities * top).round().div_(top)
    return SoftmaxGrid(threshold, bits).fake_quantize(probabilities)


def quantized_products(source: Map, values: Tensor, grids: AttentionGrids, threshold: float | None) -> Tensor:
    """Attention with quantized operands: (batch, tokens, heads, width) fp32 from q, k, v (batch, heads, tokens, width).

    Goes by blocks of query rows, so the memory of scores is bounded. What a mask hides stays exactly zero.
    """
    q = quantize_heads(source.q.float(), grids.q_scale, grids.bits)
    k = quantize_heads(source.k.float(), grids.k_scale, grids.bits).transpose(-1, -2)
    v = quantize_heads(values.float(), grids.v_scale, grids.bits)
    rows, width = q.shape[-2:]
    step = max(1, CHUNK_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[-1]))
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scores = q[:, :, part] @ k * width**-0.5
        if source.mask is None:
            probabilities = scores.softmax(-1)
        else:
            bias = source.mask[:, :, part] if source.mask.shape[2] > 1 else source.mask
            # A row that sees nothing: 0 as in torch's attention, where softmax alone has NaN.
            nothing = (bias == -torch.inf).all(-1, keepdim=True)
            probabilities = (scores + bias).softmax(-1).masked_fill(nothing, 0.0)
        parts.append(quantize_map(probabilities, grids.softmax_bits, threshold) @ v)
    return torch.cat(parts, 2).transpose(1, 2)


def check_products(name: str, attention: nn.Module) -> None:
    """RecipeError unless the attention is of the plain kind whose products can be quantized."""
    kind = type(getattr(attention, "processor", attention)).__name__
    plain = kind in PLAIN_PROCESSORS  # others may lack the attributes that come next
    extras = plain and (
        attention.spatial_norm is not None
        or attention.group_norm is not None
        or attention.residual_connection
        or attention.norm_cross
    )
    if not plain or extras:
        raise RecipeError(
            f"{name}: the products of its attention ({kind}) cannot be quantized; plain attention of diffusers can, "
            "use a recipe without attention products."
        )


def heads_of(attn: nn.Module, x: Tensor, context: Tensor | None, mask: Tensor | None) -> tuple[Map, Tensor]:
    """What an attention call multiplies: q, k and additive mask, and v (batch, heads, tokens, width).

    `context` is what keys and values are made of, None in self-attention. A mask is prepared as diffusers does it.
    """
    queries = Projections(attn, x)
    other = queries if context is None else Projections(attn, context)
    values = other.heads("to_v")
    prepared = additive_mask(attn, mask, x if context is None else context)
    return Map(queries.heads("to_q"), other.heads("to_k"), prepared), values


class QuantizedAttention:
    """The processor of an attention with quantized products, self- or cross-attention, with or without a mask."""

    def __init__(self, grids: AttentionGrids, time: TimeContext) -> None:
        self.grids, self.time = grids, time
        self.calls = 0

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The attention's output (batch, tokens, channels)."""
        source, values = heads_of(attn, hidden_states, encoder_hidden_states, attention_mask)
        heads = quantized_products(source, values, self.grids, self.grids.threshold(self.time.timestep))
        self.calls += 1
        return finish(attn, heads.to(hidden_states.dtype))


class ObservedAttention:
    """A processor that computes what the one it replaced computes, and shows its operands to `observe` before that."""

    def __init__(self, plain: Callable[..., Tensor], observe: Callable[[Map, Tensor], None]) -> None:
        self.plain, self.observe = plain, observe

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The plain output (batch, tokens, channels)."""
        self.observe(*heads_of(attn, hidden_states, encoder_hidden_states, attention_mask))
        return self.plain(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            temb=temb,
        )
