"""Transformer blocks whose norms, GELU, gates and residuals run inside the integer kernels' own passes.

The modules are those of diffusers, looked up by their attributes; nothing of diffusers is imported. Modules, parameters and
buffers stay as they are: only processors and forwards of instances are replaced, and each falls back to what it replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trdq_core.kernels import cpu
from trdq_core.kernels.dispatch import Backend
from trdq_core.kernels.surroundings import attend as torch_attend
from trdq_core.kernels.types import Epilogue, Prologue
from trdq_core.nn.attention import PLAIN_PROCESSORS, additive_mask
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.remembered import Remembered

GELU = Prologue("gelu")
# The kernels that take what is around a linear, and in which types. The C++ ones would widen half types first.
FUSED_TYPES: dict[Backend, tuple[torch.dtype, ...]] = {
    "cpp": (torch.float32,),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def fusable(*linears: nn.Module) -> bool:
    """Whether all run in kernels that fuse and read nothing but the quantized input (a low-rank branch reads more)."""
    return all(
        isinstance(linear, QuantizedLinear)
        and linear.integer
        and linear.low_rank_up is None
        and linear.input_quantizer.backend in FUSED_TYPES
        for linear in linears
    )


def takes(x: Tensor, *linears: QuantizedLinear) -> bool:
    """Whether the linears, with inputs of the type of x, may be called past their own forwards.

    Asked at each call: the model may have been moved to where other kernels run, and hooks come and go.
    """
    return not hooked(*linears) and all(
        x.dtype in FUSED_TYPES.get(linear.input_quantizer.backend, ()) for linear in linears
    )


_switched_off: ContextVar[bool] = ContextVar("fusion_off", default=False)


@contextmanager
def unfused() -> Iterator[None]:
    """Each norm, GELU, attention and residual by itself while this is open, as under torch.compile: to compare with."""
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


def fusion_is_off() -> bool:
    """Whether modules are to run by themselves: inside of `unfused`, and in what torch.compile traces."""
    return torch.compiler.is_compiling() or _switched_off.get()


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody wants to see these modules called, as offloading does to bring their weights: then none is bypassed."""
    return any("_hf_hook" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in modules)


def runs_here(x: Tensor) -> bool:
    """Whether fused kernels could take this call: eager, without gradients, (items, tokens, channels)."""
    return not fusion_is_off() and x.ndim == 3 and not (torch.is_grad_enabled() and x.requires_grad)


def product(
    linears: Sequence[QuantizedLinear], x: Tensor, prologue: Prologue | None = None, epilogue: Epilogue | None = None
) -> Tensor:
    """Outputs of linears that share an input quantizer, side by side: (..., sum of out_features)."""
    weights = [(linear.packed_weight(), linear.bias) for linear in linears]
    return linears[0].input_quantizer.linears(x, weights, prologue, epilogue)


class Around(NamedTuple):
    """What a block does around its attention or feed-forward: norm and modulation before, gate and residual after."""

    prologue: Prologue | None = None
    epilogue: Epilogue | None = None


NOTHING = Around()


class FusedAttention:
    """The processor of a plain attention with quantized projections: q, k and v in one product, then the attention.

    Queries, keys and values stay where the product left them, so no head is copied into place. The attention itself is that
    of C++: with `bits` 0 in float32, which differs from torch's by rounding alone, with 8 the kernel with int8 products, and
    `int8_calls` tells how often that ran. Beside Triton's products it is torch's own.
    """

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self.plain = plain
        self.bits = 0
        self.int8_calls = 0
        self.memory = Remembered()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The attention's output (batch, tokens, channels)."""
        if not runs_here(hidden_states) or not self.takes(attn, hidden_states):
            return self.plain(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                temb=temb,
            )
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask)

    def takes(self, attn: nn.Module, x: Tensor) -> bool:
        """Whether the projections, with inputs of the type of x, may be called past their own forwards."""
        return takes(x, attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])

    def on_cpu(self, attn: nn.Module) -> bool:
        """Whether the projections run in the C++ kernels, and so does the attention."""
        return attn.to_q.input_quantizer.backend == "cpp"

    def attend(
        self, attn: nn.Module, x: Tensor, context: Tensor | None, mask: Tensor | None, around: Around = NOTHING
    ) -> Tensor:
        """The output of a call that `runs_here`, with what the block does around it."""
        if context is None:
            q, k, v = _side_by_side((attn.to_q, attn.to_k, attn.to_v), x, around.prologue)
            source = x
        else:
            (q,) = _side_by_side((attn.to_q,), x, around.prologue)
            k, v = self._of_text(attn, context)
            source = context
        mask = additive_mask(attn, mask, source)
        if self.on_cpu(attn):
            bits = self.bits if k.shape[1] <= cpu.MAX_IN_FEATURES else 0  # more would not fit the integer sums
            self.int8_calls += bits == 8
            heads = cpu.attend(q, k, v, attn.heads, mask, bits)
        else:
            heads = torch_attend(q, k, v, attn.heads, mask)
        return product((attn.to_out[0],), heads, None, around.epilogue)

    def _of_text(self, attn: nn.Module, context: Tensor) -> Sequence[Tensor]:
        """Keys and values of another tensor than the queries': the text, for which they are the same at each step."""
        linears = (attn.to_k, attn.to_v)
        parts = [part for linear in linears for part in (linear.packed_weight(), linear.bias)]
        key = (attn.to_k.input_quantizer.state, attn.to_v.input_quantizer.state)
        found = self.memory.find(context, key, *parts)
        if found is None:
            found = tuple(_side_by_side(linears, context, None))
            self.memory.keep(context, key, found, *parts)
        return found


def _side_by_side(linears: Sequence[QuantizedLinear], x: Tensor, prologue: Prologue | None) -> list[Tensor]:
    """Outputs of linears that read x; in one product where they share its quantization."""
    if all(linear.input_quantizer is linears[0].input_quantizer for linear in linears):
        return list(product(linears, x, prologue).split([linear.out_features for linear in linears], -1))
    return [product((linear,), x, prologue) for linear in linears]


class FusedFeedForward:
    """Stands in for `forward` of a feed-forward with GELU: the second linear applies it while it quantizes its input."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.plain = module, module.forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output (batch, tokens, channels)."""
        if args or kwargs or not runs_here(hidden_states) or not self.takes(hidden_states):
            return self.plain(hidden_states, *args, **kwargs)
        return self.run(hidden_states)

    def takes(self, x: Tensor) -> bool:
        """Whether the linears, with inputs of the type of x, may be called past their own forwards."""
        return takes(x, self.module.net[0].proj, self.module.net[2])

    def run(self, x: Tensor, around: Around = NOTHING) -> Tensor:
        """The output of a call that `runs_here`, with what the block does around it."""
        hidden = product((self.module.net[0].proj,), x, around.prologue)
        return product((self.module.net[2],), hidden, GELU, around.epilogue)


# What diffusers' common attention has; how these are set says whether `FusedAttention` computes the same.
ATTENTION_PARTS = (
    "processor", "set_processor", "spatial_norm", "group_norm", "residual_connection", "norm_q", "norm_k", "norm_cross",
    "rescale_output_factor", "to_q", "to_k", "to_v", "to_out",
)  # fmt: skip


def fuse_attention(attention: nn.Module) -> bool:
    """Put a `FusedAttention` into an attention whose work it does; False, and nothing changed, where it does not."""
    if not all(hasattr(attention, name) for name in ATTENTION_PARTS):  # a family with an attention class of its own
        return False
    plain = type(attention.processor).__name__ in PLAIN_PROCESSORS[:2]
    extras = attention.spatial_norm is not None or attention.group_norm is not None or attention.residual_connection
    norms = attention.norm_q is not None or attention.norm_k is not None or attention.norm_cross
    linears = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    if not plain or extras or norms or attention.rescale_output_factor != 1.0 or not fusable(*linears):
        return False
    attention.set_processor(FusedAttention(attention.processor))
    return True


def fuse_feed_forward(module: nn.Module) -> bool:
    """Put a `FusedFeedForward` into a feed-forward of linear, GELU (tanh) and linear; False where it is of another kind."""
    first, last = module.net[0], module.net[2]
    tanh = type(first).__name__ == "GELU" and getattr(first, "approximate", None) == "tanh"
    if not tanh or not fusable(first.proj, last):
        return False
    module.forward = FusedFeedForward(module)
    return True
