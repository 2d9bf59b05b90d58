"""Attention sharing put into a denoiser: which blocks there are, which are shared when, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from trdq_core.errors import RecipeError
from trdq_core.nn.attention import SharedAttention, check_attention
from trdq_core.nn.modules import share_copy
from trdq_core.plan import LayerInfo
from trdq_core.specs import SharingSpec
from trdq_core.timegroups import TimeContext, TimeGroups


@dataclass(frozen=True)
class Sharing:
    """What `apply_sharing` installed: the processors of the shared blocks by block number."""

    spec: SharingSpec
    processors: dict[int, SharedAttention]

    def facts(self) -> dict[str, Any]:
        """For reports: what was asked for and predicted, and how often it happened."""
        processors = self.processors.values()
        return {
            **self.spec.to_dict(),
            "shared_calls": sum(processor.shared_calls for processor in processors),
            "plain_calls": sum(processor.plain_calls for processor in processors),
        }


def self_attentions(layers: Iterable[LayerInfo]) -> list[str]:
    """Names of the self-attention modules in model order; the place in the list is the block's number."""
    return [layer.name.rpartition(".")[0] for layer in layers if layer.role == "self_q"]


def apply_sharing(denoiser: nn.Module, layers: Iterable[LayerInfo], spec: SharingSpec, time: TimeContext) -> Sharing:
    """Share attention maps in `denoiser` from now on. Give it a copy: its processors are replaced, its weights stay.

    `time` has to follow the denoiser's timestep. RecipeError if the model lacks a block or its attention is of no plain kind.
    """
    names = self_attentions(layers)
    wanted = sorted({block for group in spec.blocks for block in group})
    if wanted and wanted[-1] >= len(names):
        raise RecipeError(
            f"sharing blocks: got block {wanted[-1]}; this model has self-attention in blocks 0 to {len(names) - 1}."
        )
    processors = {}
    for block in wanted:
        attention = denoiser.get_submodule(names[block])
        check_attention(names[block], attention)
        active = frozenset(index for index, group in enumerate(spec.blocks) if block in group)
        processors[block] = SharedAttention(attention.processor, TimeGroups(spec.edges), active, time)
        attention.set_processor(processors[block])
    return Sharing(spec, processors)


def shared_copy(
    denoiser: nn.Module, layers: Iterable[LayerInfo], spec: SharingSpec, *, argument: str = "timestep"
) -> tuple[nn.Module, TimeContext, Sharing]:
    """A full-precision copy with sharing, weights shared with the original, which is untouched."""
    copy, time = share_copy(denoiser), TimeContext(TimeGroups(spec.edges))
    sharing = apply_sharing(copy, layers, spec, time)
    time.attach(copy, argument)
    return copy, time, sharing


def attention_flops(tokens: int, channels: int) -> tuple[int, int]:
    """Floating-point operations of one self-attention with both branches, and how many of them sharing saves.

    Each branch has four projections and the products with keys and values; shared, one branch loses two projections and
    the scores. The softmax, halved as well, is not counted.
    """
    projection, product = 2 * tokens * channels * channels, 2 * tokens * tokens * channels
    return 2 * (4 * projection + 2 * product), 2 * projection + product
