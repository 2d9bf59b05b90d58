"""Roles of a denoiser's linears, told from where they stand in a transformer block. Roles make recipes portable."""

from __future__ import annotations

import re

from torch import nn

from trdq_core.plan import LayerInfo

# First match wins. Names are those of diffusers' BasicTransformerBlock and its relatives. Blocks that attend across the
# frames of a clip have roles of their own: their inputs and their sensitivity are not those of the spatial blocks.
_TEMPORAL = r"(^|\.)temporal_transformer_blocks\.\d+\."
_PATTERNS: tuple[tuple[str, str], ...] = (
    (_TEMPORAL + r"attn1\.to_q$", "temporal_q"),
    (_TEMPORAL + r"attn1\.to_k$", "temporal_k"),
    (_TEMPORAL + r"attn1\.to_v$", "temporal_v"),
    (_TEMPORAL + r"attn1\.to_out\.0$", "temporal_out"),
    (_TEMPORAL + r"ff\.net\.0\.proj$", "temporal_mlp_in"),
    (_TEMPORAL + r"ff\.net\.2$", "temporal_mlp_out"),
    (r"attn1\.to_q$", "self_q"),
    (r"attn1\.to_k$", "self_k"),
    (r"attn1\.to_v$", "self_v"),
    (r"attn1\.to_out\.0$", "self_out"),
    (r"attn2\.to_q$", "cross_q"),
    (r"attn2\.to_k$", "cross_k"),
    (r"attn2\.to_v$", "cross_v"),
    (r"attn2\.to_out\.0$", "cross_out"),
    (r"\.ff\.net\.0\.proj$", "mlp_in"),
    (r"\.ff\.net\.2$", "mlp_out"),
    (r"(^|\.)(adaln_single|norm\d?|norm_out)\.linear$", "modulation"),
    (r"(^|\.)(proj_out(_\d)?)$", "final"),
    (r"(embed|emb|caption_projection)", "embed"),
)
# Linears of one attention that read the same tensor: the first named leads.
_SIBLINGS = {
    "self_k": "self_q",
    "self_v": "self_q",
    "cross_v": "cross_k",
    "temporal_k": "temporal_q",
    "temporal_v": "temporal_q",
}


def role_of(name: str) -> str:
    """The role of a linear by its name, "other" if it cannot be told."""
    return next((role for pattern, role in _PATTERNS if re.search(pattern, name)), "other")


def find_linears(denoiser: nn.Module) -> tuple[LayerInfo, ...]:
    """Every linear of `denoiser` with role, widths, and the leader of its input."""
    found: dict[str, LayerInfo] = {}
    by_parent: dict[tuple[str, str], str] = {}
    for name, module in denoiser.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        role, parent = role_of(name), name.rpartition(".")[0]
        by_parent[parent, role] = name
        leader = by_parent.get((parent, _SIBLINGS.get(role, role)), name)
        found[name] = LayerInfo(name, role, leader, module.in_features, module.out_features)
    return tuple(found.values())
