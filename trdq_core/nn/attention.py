"""Self-attention whose unconditional branch takes the attention map of the conditional one: softmax once, values twice.

The modules are those of diffusers' `Attention`, which look up a processor; nothing of diffusers is imported for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trdq_core import branches
from trdq_core.errors import RecipeError, ShapeError
from trdq_core.kernels.surroundings import added_to_scores
from trdq_core.kernels.types import QuantizedActivation
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.timegroups import TimeContext, TimeGroups

SCORE_BYTES = 1 << 20  # of one block of score rows: what stays in the second-level cache of one core
PLAIN_PROCESSORS = ("AttnProcessor2_0", "AttnProcessor", "FusedAttention")  # the last is ours, see `fused`


class Map(NamedTuple):
    """What an attention map is computed from: q and k (batch, heads, tokens, width), and the mask added to the scores."""

    q: Tensor
    k: Tensor
    mask: Tensor | None


def check_attention(name: str, attention: nn.Module) -> None:
    """RecipeError unless the attention is of the plain kind whose work can be shared."""
    kind = type(getattr(attention, "processor", attention)).__name__
    plain = kind in PLAIN_PROCESSORS  # others may lack the attributes that come next
    extras = plain and (
        attention.spatial_norm is not None or attention.group_norm is not None or attention.residual_connection
    )
    if not plain or extras:
        raise RecipeError(
            f"{name}: its attention ({kind}) cannot be shared; plain self-attention of diffusers can, leave the block out."
        )


def score_rows(keys: int, rows: int) -> int:
    """How many rows of scores over `keys` keys are computed at a time on a CPU: its threads split them among their caches."""
    return max(16, min(rows, torch.get_num_threads() * SCORE_BYTES // (4 * keys)))


def map_blocks(source: Map) -> Iterator[tuple[int, int, slice, Tensor]]:
    """The attention map in blocks that stay in cache: batch item, head, rows, and probabilities (rows, keys) fp32.

    A block is overwritten by the next one.
    """
    q, k, mask = source
    batch, heads, rows, width = q.shape
    keys = k.shape[2]
    step = score_rows(keys, rows)
    buffer = torch.empty(step, keys, device=q.device)
    for item in range(batch):
        for head in range(heads):
            columns = (k[item, head].float() * width**-0.5).t()
            queries = q[item, head].float()
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                scores = buffer[: part.stop - start]
                torch.mm(queries[part], columns, out=scores)
                if mask is None:
                    torch.softmax(scores, -1, out=scores)
                else:
                    bias = mask[item, head]
                    bias = bias[part] if bias.shape[0] > 1 else bias
                    scores += bias
                    torch.softmax(scores, -1, out=scores)
                    # A row that sees nothing: 0 as in torch's attention, where softmax alone has NaN.
                    scores.masked_fill_((bias == -torch.inf).all(-1, keepdim=True), 0.0)
                yield item, head, part, scores


def _attend_by_blocks(q: Tensor, k: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    values = values.contiguous()
    batch, heads, rows, _ = q.shape
    out = torch.empty(batch, rows, heads, values.shape[-1], dtype=q.dtype)
    for item, head, part, probabilities in map_blocks(Map(q, k, mask)):
        torch.mm(probabilities, values[item, head], out=out[item, part, head])
    return out


# The same as one operator to torch.compile, which would otherwise unroll the loop over row blocks.
_attend_operator = torch.library.custom_op("trdq::attend", _attend_by_blocks, mutates_args=(), device_types="cpu")


@_attend_operator.register_fake
def _(q: Tensor, k: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], values.shape[-1])


def attend(source: Map, values: Tensor) -> Tensor:
    """The map times `values` (batch, heads, tokens, any width): (batch, tokens, heads, width), heads side by side.

    On a CPU in fp32 by row blocks, because torch's fused kernel there wants values as wide as the queries and
    otherwise holds all scores at once. Elsewhere torch's own attention takes unequal widths.
    """
    q, k, mask = source
    traced = torch.is_grad_enabled() and q.requires_grad  # writing into given memory has no gradient
    if traced or q.device.type != "cpu" or q.dtype is not torch.float32:
        return functional.scaled_dot_product_attention(q, k, values, attn_mask=mask).transpose(1, 2)
    by_blocks = _attend_operator if torch.compiler.is_compiling() else _attend_by_blocks
    return by_blocks(q, k, values, mask)


class Projections:
    """Queries, keys and values of one attention over chosen items of its input, each input transformed and quantized once.

    Linears that share an input quantizer take rows of one quantized activation; what the quantizer itself remembers for
    its usual readers is neither read nor changed.
    """

    def __init__(self, attention: nn.Module, x: Tensor) -> None:
        self._attention, self._x = attention, x
        self._quantized: dict[int, tuple[int, QuantizedActivation]] = {}

    def heads(self, name: str, first: int = 0) -> Tensor:
        """to_q, to_k or to_v of the items from `first` on: (items, heads, tokens, width)."""
        attention = self._attention
        flat = self._linear(getattr(attention, name), first)
        y = flat.view(*flat.shape[:2], attention.heads, -1).transpose(1, 2)
        norm = {"to_q": attention.norm_q, "to_k": attention.norm_k}.get(name)
        return y if norm is None else norm(y)

    def map(self, mask: Tensor | None, first: int = 0) -> Map:
        """What the attention map of the items from `first` on is computed from."""
        return Map(self.heads("to_q", first), self.heads("to_k", first), mask if mask is None else mask[first:])

    def _linear(self, linear: nn.Module, first: int) -> Tensor:
        x = self._x[first:]
        if not isinstance(linear, QuantizedLinear) or linear.input_quantizer.readers == 1:
            return linear(x)
        quantizer = linear.input_quantizer
        begun, activation = self._quantized.get(id(quantizer), (None, None))
        if begun is None or begun > first:
            begun, activation = first, quantizer.quantize(x)
            self._quantized[id(quantizer)] = (begun, activation)
        return linear.product(activation.rows((first - begun) * x.shape[1]), x)


def additive_mask(attention: nn.Module, mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask as diffusers prepares it, (batch, heads, 1 or tokens, tokens), as something to add to the scores."""
    if mask is None:
        return None
    prepared = attention.prepare_attention_mask(mask, x.shape[1], x.shape[0])
    prepared = prepared.view(x.shape[0], attention.heads, -1, prepared.shape[-1])
    return added_to_scores(prepared, x.dtype)


def same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both branches may look at the same tokens; a map is shared only then."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(torch.equal(a, b))


class SharedAttention:
    """The processor of a shared block. Where nothing is shared it hands over to the processor it replaced.

    Both branches in one batch: queries, keys and scores of the conditional half only, nothing is kept. Two calls: queries
    and keys of the conditional call wait in the step's store for the unconditional one, which takes them if timestep,
    sizes and mask are its own, and computes its own otherwise.
    """

    def __init__(
        self, plain: Callable[..., Tensor], groups: TimeGroups, active: frozenset[int], time: TimeContext
    ) -> None:
        self.plain, self.groups, self.active, self.time = plain, groups, active, time
        self._calls = torch.zeros(
            2, dtype=torch.int64
        )  # shared, plain; a tensor, since torch.compile guards on numbers
        self.prepare()

    @property
    def shared_calls(self) -> int:
        """How often the map was shared."""
        return int(self._calls[0])

    @property
    def plain_calls(self) -> int:
        """How often it was not."""
        return int(self._calls[1])

    def prepare(self) -> None:
        """Look up branch and time of the call to come. torch.compile cannot trace that, so it is done before its graphs."""
        self._step = branches.present()
        self._on = self.groups.group_of(self.time.timestep) in self.active

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The attention's output (batch, tokens, channels)."""
        if not torch.compiler.is_compiling():
            self.prepare()
        step, heads = self._step, None
        if self._on and encoder_hidden_states is None:
            mask = additive_mask(attn, attention_mask, hidden_states)
            if step.branch == "joint":
                heads = self._joint(attn, hidden_states, mask)
            elif step.branch == "conditional":
                heads = self._conditional(attn, hidden_states, mask, step)
            elif step.branch == "unconditional":
                heads = self._unconditional(attn, hidden_states, mask, step)
        if heads is None:
            self._calls[1] += 1
            return self.plain(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                temb=temb,
            )
        return finish(attn, heads)

    def _joint(self, attn: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor | None:
        half = len(x) // 2
        if len(x) % 2:
            raise ShapeError(
                f"attention sharing: got a batch of {len(x)}; with both branches in one batch it must be even."
            )
        if mask is not None and not same_mask(mask[:half], mask[half:]):
            return None
        projections = Projections(attn, x)
        values = projections.heads("to_v")  # first, so that q and k find the whole input quantized
        both = torch.cat([values[:half], values[half:]], -1)
        out = attend(projections.map(mask, half), both)
        self._calls[0] += 1
        return torch.cat(out.chunk(2, -1))

    def _conditional(self, attn: nn.Module, x: Tensor, mask: Tensor | None, step: branches.GuidedStep) -> Tensor:
        projections = Projections(attn, x)
        source = projections.map(mask)
        if (self, "first") not in step.kept:  # the unconditional call is still to come
            step.kept[self] = (self.time.timestep, source)
        values = projections.heads("to_v")
        return functional.scaled_dot_product_attention(source.q, source.k, values, attn_mask=source.mask).transpose(
            1, 2
        )

    def _unconditional(
        self, attn: nn.Module, x: Tensor, mask: Tensor | None, step: branches.GuidedStep
    ) -> Tensor | None:
        timestep, source = step.kept.pop(self, (None, None))
        step.kept[self, "first"] = True
        if (
            source is None
            or timestep != self.time.timestep
            or len(source.q) != len(x)
            or not same_mask(source.mask, mask)
        ):
            return None
        self._calls[0] += 1
        return attend(source, Projections(attn, x).heads("to_v"))


def finish(attn: nn.Module, heads: Tensor) -> Tensor:
    """Outputs of the heads (batch, tokens, heads, width) through the output projection: (batch, tokens, channels)."""
    return attn.to_out[1](attn.to_out[0](heads.flatten(2))) / attn.rescale_output_factor
