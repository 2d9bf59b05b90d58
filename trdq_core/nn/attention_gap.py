"""What self-attention would lose by computing less: the gap between the guidance branches, and between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trdq_core import branches
from trdq_core.nn.attention import Map, Projections, additive_mask, map_blocks, score_rows
from trdq_core.timegroups import TimeContext


class Gap(NamedTuple):
    """How far the branches are apart in one attention call, as sums (heads,) from which the measures follow."""

    dot: Tensor  # of the two maps, over all rows and columns
    conditional: Tensor  # squared norm of the conditional map
    unconditional: Tensor  # the same of the other
    error: Tensor  # squared norm of A_c V_u - A_u V_u
    output: Tensor  # squared norm of A_u V_u

    def map_cosine(self) -> Tensor:
        """Cosine similarity of the flattened maps, (heads,)."""
        return self.dot / (self.conditional * self.unconditional).sqrt()

    def output_error(self) -> Tensor:
        """||A_c V_u - A_u V_u|| / ||A_u V_u||, (heads,)."""
        return (self.error / self.output).sqrt()

    def block_error(self) -> Tensor:
        """The same over all heads together, ()."""
        return (self.error.sum() / self.output.sum()).sqrt()


@torch.no_grad()
def measure_gap(conditional: Map, unconditional: Map, values: Tensor) -> Gap:
    """The gap of one call from both maps (batch, heads, tokens, width) and the unconditional values.

    Goes by row blocks of one head: two blocks of scores are in memory at a time, never a whole map. Short maps, as of
    attention across the frames of a clip, go by as many items at once as fit into the same memory.
    """
    batch, heads, tokens, _ = conditional.q.shape
    keys = conditional.k.shape[2]
    items = score_rows(keys, batch * heads * tokens) // (heads * tokens)
    sums = torch.zeros(5, heads, dtype=torch.float64)
    if items:
        for start in range(0, batch, items):
            part = slice(start, start + items)
            sums += _sums(_whole(conditional, part), _whole(unconditional, part), values[part].float())
        return Gap(*sums)
    pairs = zip(map_blocks(conditional), map_blocks(unconditional), strict=True)
    for (item, head, _, own), (_, _, _, other) in pairs:
        sums[:, head] += _sums(own[None, None], other[None, None], values[item, head].float()[None, None])[:, 0]
    return Gap(*sums)


def _whole(source: Map, part: slice) -> Tensor:
    """The maps of some items (items, heads, tokens, keys), fp32."""
    q, k = source.q[part].float(), source.k[part].float() * source.q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2)
    return (scores if source.mask is None else scores + source.mask[part]).softmax(-1)


def _sums(own: Tensor, other: Tensor, value: Tensor) -> Tensor:
    """The five sums of a `Gap` (5, heads) over maps (items, heads, rows, keys) and values (items, heads, keys, width)."""
    expected = other @ value
    parts = (own * other, own.square(), other.square(), (own @ value - expected).square(), expected.square())
    return torch.stack([part.sum((0, 2, 3)) for part in parts]).double().cpu()


class MeasuringAttention:
    """A processor that computes what the one it replaced computes and, beside it, the gap between the branches, and how far
    the output (batch, tokens, channels) moved since the step before: ||o_t - o_before|| / ||o_t||.

    Works on both branches in one batch and on two calls in either order: the first waits in the step's store.
    """

    def __init__(self, plain: Callable[..., Tensor], time: TimeContext) -> None:
        self.plain, self.time = plain, time
        self.seen: dict[float, list[Gap]] = {}
        self.moved: dict[float, list[float]] = {}  # nothing at the first step of a run
        self._before: dict[str, tuple[float, Tensor]] = {}
        self.tokens = self.channels = 0
        self.parts = 1  # calls on a clip look at each frame, or at each patch over time, alone: how many a branch has

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The plain output (batch, tokens, channels)."""
        step = branches.present()
        if step.branch not in ("single", "alone") and encoder_hidden_states is None:
            mask = additive_mask(attn, attention_mask, hidden_states)
            self._measure(attn, hidden_states, mask, step)
        output = self.plain(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, temb=temb
        )
        self._follow(output, step.branch)
        return output

    def _follow(self, output: Tensor, branch: str) -> None:
        timestep, before = self._before.get(branch, (0.0, None))
        if before is not None and self.time.timestep < timestep and before.shape == output.shape:  # else a run begins
            moved = float((output - before).norm() / output.norm())
            self.moved.setdefault(self.time.timestep, []).append(moved)
        self._before[branch] = (self.time.timestep, output)

    def _measure(self, attn: nn.Module, x: Tensor, mask: Tensor | None, step: branches.GuidedStep) -> None:
        projections = Projections(attn, x)
        values, source = projections.heads("to_v"), projections.map(mask)
        if step.branch == "joint":
            half = len(x) // 2
            first, second = (
                Map(*(None if part is None else part[rows] for part in source))
                for rows in (slice(None, half), slice(half, None))
            )
            self._add(measure_gap(second, first, values[:half]), x[:half])
            return
        other = "unconditional" if step.branch == "conditional" else "conditional"
        waiting = step.kept.pop((self, other), None)
        if waiting is None:
            step.kept[self, step.branch] = (source, values)
        elif step.branch == "unconditional":
            self._add(measure_gap(waiting[0], source, values), x)
        else:
            self._add(measure_gap(source, *waiting), x)

    def _add(self, gap: Gap, x: Tensor) -> None:
        self.seen.setdefault(self.time.timestep, []).append(gap)
        self.parts, self.tokens, self.channels = x.shape
