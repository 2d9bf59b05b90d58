"""What stands around a quantized linear, in plain torch: the oracle of the fused kernels, and what runs where they do not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.kernels.types import Epilogue, Prologue


def apply_prologue(rows: Tensor, prologue: Prologue) -> Tensor:
    """GELU, or norm and modulation, of rows (tokens, channels), in their dtype: float64 for the oracle."""
    if prologue.kind == "gelu":
        return functional.gelu(rows, approximate="tanh")
    assert prologue.shift is not None and prologue.scale is not None  # checked by the caller
    normal = functional.layer_norm(rows, rows.shape[1:], eps=prologue.epsilon).unflatten(0, (len(prologue.shift), -1))
    scale, shift = (part.to(rows.dtype).unsqueeze(1) for part in (prologue.scale, prologue.shift))
    return (normal * (1 + scale) + shift).flatten(0, 1)


def apply_epilogue(product: Tensor, epilogue: Epilogue) -> Tensor:
    """added + gate * product for a product (tokens, channels)."""
    added, gate = epilogue
    if gate is not None:
        product = (product.unflatten(0, (len(gate), -1)) * gate.to(product.dtype).unsqueeze(1)).flatten(0, 1)
    return added.to(product.dtype) + product


def added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as something to add to the scores: one of bool, where True takes part, as 0 and -inf in `dtype`."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(width) + mask) v in the dtype of q; q (items, rows, heads * width), mask as of torch's attention.

    A row that sees no key is 0, as torch has it.
    """
    parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v)]
    return functional.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)


def attend_int8(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """The same in float64 from operands on the grids of the int8 kernel: the oracle of its two products.

    Queries, and keys without their mean, have one scale a token; values one a channel; probabilities are multiples of 1/255
    of the largest of their row.
    """
    query, key, value = (part.double().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    key = key - key.mean(2, keepdim=True)
    scores = _rounded(query, -1) @ _rounded(key, -1).mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + added_to_scores(mask, torch.float64)
    top = scores.amax(-1, keepdim=True).clamp_min(
        torch.finfo(torch.float64).min
    )  # a row that sees nothing has no levels
    levels = torch.round(255 * torch.exp(scores - top))
    total = levels.sum(-1, keepdim=True).clamp_min(1)
    return ((levels @ _rounded(value, -2)) / total).transpose(1, 2).flatten(2).float()


def _rounded(x: Tensor, axis: int) -> Tensor:
    scale = x.abs().amax(axis, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(x / scale) * scale
