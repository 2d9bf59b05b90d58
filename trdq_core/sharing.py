"""Attention sharing put into a denoiser: which blocks there are, what is left out when, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trdq_core.errors import RecipeError
from trdq_core.nn.attention import SharedAttention, check_attention
from trdq_core.nn.guided_forward import GuidedForward
from trdq_core.nn.modules import share_copy
from trdq_core.nn.steps import ReusingAttention, StepMemory
from trdq_core.plan import LayerInfo
from trdq_core.specs import SharingSpec
from trdq_core.timegroups import TimeArgument, TimeContext, TimeGroups


@dataclass(frozen=True)
class Sharing:
    """What `apply_sharing` installed: the processors of the shared and of the reusing blocks by block number."""

    spec: SharingSpec
    processors: dict[int, SharedAttention]
    reusing: dict[int, ReusingAttention] = field(default_factory=dict)
    forward: GuidedForward | None = None

    def facts(self) -> dict[str, Any]:
        """For reports: what was asked for and predicted, and how often it happened."""
        processors, reusing = self.processors.values(), self.reusing.values()
        facts = {
            **self.spec.to_dict(),
            "shared_calls": sum(processor.shared_calls for processor in processors),
            "plain_calls": sum(processor.plain_calls for processor in processors),
        }
        if reusing:
            facts["reused_calls"] = sum(processor.reused_calls for processor in reusing)
            facts["computed_calls"] = sum(processor.computed_calls for processor in reusing)
        if self.forward is not None and self.forward.below is not None:
            facts["skipped_calls"], facts["full_calls"] = self.forward.skipped_calls, self.forward.full_calls
        return facts


def self_attentions(layers: Iterable[LayerInfo]) -> list[str]:
    """Names of the self-attention modules in model order; the place in the list is the block's number."""
    return [layer.name.rpartition(".")[0] for layer in layers if layer.role == "self_q"]


def temporal_attentions(layers: Iterable[LayerInfo]) -> list[str]:
    """Names of the attention modules across the frames of a clip, in model order. They are measured, never shared."""
    return [layer.name.rpartition(".")[0] for layer in layers if layer.role == "temporal_q"]


def apply_sharing(denoiser: nn.Module, layers: Iterable[LayerInfo], spec: SharingSpec, time: TimeContext) -> Sharing:
    """Leave out of `denoiser` what `spec` says, from now on. Give it a copy: its processors and its forward are replaced,
    its weights stay.

    `time` has to follow the denoiser's timestep. RecipeError if the model lacks a block or its attention is of no plain kind.
    """
    names, groups = self_attentions(layers), TimeGroups(spec.edges)
    shared, across = _blocks_of(spec.blocks), _blocks_of(spec.across_steps)
    wanted = sorted({*shared, *across})
    if wanted and wanted[-1] >= len(names):
        raise RecipeError(
            f"sharing blocks: got block {wanted[-1]}; this model has self-attention in blocks 0 to {len(names) - 1}."
        )
    if not spec.active:
        return Sharing(spec, {})
    time.followed = True
    processors, reusing, memory = {}, {}, StepMemory(time)
    for block in wanted:
        attention = denoiser.get_submodule(names[block])
        check_attention(names[block], attention)
        inner = attention.processor
        if block in shared:
            inner = processors[block] = SharedAttention(inner, groups, shared[block], time)
        if block in across:
            inner = reusing[block] = ReusingAttention(inner, groups, across[block], memory)
        attention.set_processor(inner)
    readers = (*processors.values(), *reusing.values())
    forward = GuidedForward(denoiser.forward, memory, readers, spec.skip_unconditional_below, spec.skipped_guidance)
    denoiser.forward = forward  # an attribute of this copy; the class keeps its own
    return Sharing(spec, processors, reusing, forward)


def _blocks_of(lists: tuple[tuple[int, ...], ...]) -> dict[int, frozenset[int]]:
    """The time groups each listed block is active in."""
    return {
        block: frozenset(group for group, members in enumerate(lists) if block in members)
        for block in sorted({block for members in lists for block in members})
    }


def shared_copy(
    denoiser: nn.Module, layers: Iterable[LayerInfo], spec: SharingSpec, *, argument: TimeArgument | str = "timestep"
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
