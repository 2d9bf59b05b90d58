"""Roles of a denoiser's linears and which of them read one tensor, from names and structure. Roles make recipes portable.

Nothing is run and no weight is read, so a model on the meta device does. `adapters.inputs` checks by a traced call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from trdq_core.plan import LayerInfo

# A block is one of a numbered list: "transformer_blocks.3". What stands before the number tells space, time and text.
_BLOCK = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)+)\d+\.(?P<inside>.+)$")
_EMBED = re.compile(r"emb(ed|_|\b)|caption_projection|patchif|(^|\.)(\w+_in|\w*time\w*|proj_in)(\.|$)")
_MODULATION = re.compile(
    r"norm\w*\.linear(_1)?$|(adaln_single|time_embed)\.linear$|ada_?ln_?mod|modulation|(^|_)mod(\.|$)", re.IGNORECASE
)
_FINAL = re.compile(
    r"(^|\.)(proj_out(_\d)?|norm_out\.linear_2|\w*final\w*\.(?!.*(ada|mod)).+|head|to_pixels|unpatch\w*)$"
)
_SKIP = re.compile(r"(^|[._])skip([._]|$)")
_TEMPORAL = re.compile(r"tempora")
_TEXT = re.compile(r"context|txt|text|caption|encoder_")
# Leaves of an attention, as diffusers and the first releases of the families call them.
_LEAVES = (
    ("q", re.compile(r"^(to_q|q|wq|query|(proj_)?q(uery)?(_proj|_linear)?)$")),
    ("k", re.compile(r"^(to_k|k|wk|key|(proj_)?k(ey)?(_proj|_linear)?)$")),
    ("v", re.compile(r"^(to_v|v|wv|value|(proj_)?v(alue)?(_proj|_linear)?)$")),
    ("added_q", re.compile(r"^add_q_proj$")),
    ("added_k", re.compile(r"^add_k_proj$")),
    ("added_v", re.compile(r"^add_v_proj$")),
    ("added_out", re.compile(r"^to_add_out(\.0)?$")),
    ("qkv", re.compile(r"^(to_|w)?(qkv|kv)(_mlp)?(_proj)?$", re.IGNORECASE)),
    ("out", re.compile(r"^(to_out(\.0)?|out|wo|o|o_proj|out_proj|proj_out|proj|c_proj|merge)$")),
)
_FEED_FORWARD = re.compile(r"(^|_)(ff|ffn|mlp|feed_?forward)(_|$|\d)")
# Blocks that hand one tensor to attention and feed-forward. Others look alike but put theirs together anew (HunyuanVideo).
_ONE_INPUT = ("FluxSingleTransformerBlock",)
# Modules that hand the weights of their linears to a function of torch and never call them.
_WEIGHTS_ONLY = ("HunyuanDiTAttentionPool",)
_IN_AND_OUT = {"proj_mlp": "mlp_in", "linear1": "fused_in", "proj_out": "fused_out", "linear2": "fused_out"}


class _Place(NamedTuple):
    """Where a linear stands: its role, and a key that linears reading the same tensor have in common."""

    role: str
    reads: str


def find_linears(denoiser: nn.Module) -> tuple[LayerInfo, ...]:
    """Every linear of `denoiser` with role, widths, and the leader of its input: the first linear that reads it."""
    linears = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    crossing = {name for name, module in denoiser.named_modules() if _is_cross(name, module)}
    uncalled = [name for name, module in denoiser.named_modules() if type(module).__name__ in _WEIGHTS_ONLY]
    single_stream = [name for name, module in denoiser.named_modules() if type(module).__name__ in _ONE_INPUT]
    places = place(linears, crossing, single_stream)
    for name in linears:
        if name.rpartition(".")[0] in uncalled:
            places[name] = _Place("uncalled", name)
    leaders: dict[str, str] = {}
    for name in linears:
        leaders.setdefault(places[name].reads, name)
    return tuple(
        LayerInfo(name, places[name].role, leaders[places[name].reads], linear.in_features, linear.out_features)
        for name, linear in linears.items()
    )


def place(
    linears: Mapping[str, nn.Linear], crossing: Iterable[str] = (), single_stream: Iterable[str] = ()
) -> dict[str, _Place]:
    """The place of every linear. `crossing` names the modules that are cross-attentions, `single_stream` the blocks whose
    attention and feed-forward read one tensor."""
    families: dict[str, list[str]] = {}
    for name in linears:
        families.setdefault(_family(name), []).append(name)
    found: dict[str, _Place] = {}
    for family, members in families.items():
        leaves = {name: name[len(family) :].lstrip(".") for name in members}
        kinds = {name: _kind(leaf) for name, leaf in leaves.items()}
        if {"q", "k", "v"} <= set(kinds.values()) or "qkv" in kinds.values():
            found |= _attention(family, kinds, leaves, family in set(crossing))
        elif _BLOCK.match(f"{family}.") and len(members) > 1 and _FEED_FORWARD.search(_last_word(family)):
            found |= _feed_forward(family, members, linears)
    for name in linears:
        block = next((one for one in single_stream if name.startswith(f"{one}.")), None)
        one = found.get(name) or _Place(role_of(name), name)
        if block is not None and one.role in ("mlp_in", "self_q", "self_k", "self_v", "fused_in"):
            one = one._replace(reads=f"{block}:in")
        found[name] = _outranked(name, one)
    return found


def block_of(name: str) -> str:
    """The block a linear stands in, "transformer_blocks.3" for instance; empty outside of blocks."""
    block = _BLOCK.match(name)
    return name[: block.start("inside")].rstrip(".") if block else ""


def role_of(name: str) -> str:
    """The role of a linear by its name alone, "other" if it cannot be told."""
    block = _BLOCK.match(name)
    if block is None:
        return _outside(name)
    inside = block["inside"]
    for pattern, role in ((_MODULATION, "modulation"), (_SKIP, "skip")):
        if pattern.search(inside):
            return role
    if inside in _IN_AND_OUT:
        return _IN_AND_OUT[inside]
    family = _family(name)
    kind = _kind(name[len(family) :].lstrip("."))
    if kind is not None and "att" in _last_word(family):
        places = _attention(family, {name: kind}, {name: ""}, _crosses(family))
        return _outranked(name, places[name]).role
    if _FEED_FORWARD.search(_last_word(family)):
        part = "in" if re.search(r"net\.0\.proj$|(linear_?|fc|w)_?[13]$|up|gate", name) else "out"
        return _outranked(name, _Place(f"{_prefix(family, '')}mlp_{part}", name)).role
    return "embed" if _EMBED.search(inside) or _EMBED.search(block["stack"].rstrip(".")) else "other"


def _outside(name: str) -> str:
    """The role of a linear that stands in no block."""
    for pattern, role in ((_MODULATION, "modulation"), (_FINAL, "final"), (_EMBED, "embed")):
        if pattern.search(name):
            return role
    return "other"


def _outranked(name: str, one: _Place) -> _Place:
    """Blocks inside an embedder, the token refiner of a text embedder for instance, belong to the embedder."""
    block = _BLOCK.match(name)
    inside_embedder = block is not None and re.search(r"emb(ed|_|\b)", block["stack"])
    embedder_of_its_own = block is None and one.role not in ("modulation", "final", "other")
    if inside_embedder or embedder_of_its_own:
        return one._replace(role=one.role if one.role == "modulation" else "embed")
    return one


def _attention(
    family: str, kinds: Mapping[str, str | None], leaves: Mapping[str, str], cross: bool
) -> dict[str, _Place]:
    """Places of one attention's linears."""
    prefix = _prefix(family, "cross_" if cross else "self_")
    added = "cross_" if cross else "text_"
    fused = any("mlp" in leaf for leaf in leaves.values())
    found = {}
    for name, kind in kinds.items():
        if kind == "qkv":
            found[name] = _Place("fused_in", name)
        elif kind == "out":
            found[name] = _Place("fused_out" if fused else f"{prefix}out", name)
        elif kind == "added_out":
            found[name] = _Place(f"{added}out", name)
        elif kind is not None and kind.startswith("added_"):
            found[name] = _Place(added + kind[-1], f"{family}:added")
        elif kind is not None:
            apart = cross and kind == "q"
            found[name] = _Place(f"{prefix}{kind}", f"{family}:q" if apart else f"{family}:in")
    return found


def _feed_forward(family: str, members: list[str], linears: Mapping[str, nn.Linear]) -> dict[str, _Place]:
    """Places of one feed-forward: linears shaped like its first one read its input, those back to its width write.

    Where both widths are equal the last one writes.
    """
    first, prefix, found = linears[members[0]], _prefix(family, ""), {}
    for index, name in enumerate(members):
        one, last = linears[name], index == len(members) - 1
        alike = (one.in_features, one.out_features) == (first.in_features, first.out_features)
        reads_input = index == 0 or (alike and not (last and first.in_features == first.out_features))
        found[name] = _Place(f"{prefix}mlp_in", f"{family}:in") if reads_input else _Place(f"{prefix}mlp_out", name)
    return found


def _prefix(family: str, plain: str) -> str:
    """What stands before the part in a role: time and text have parts of their own, other blocks those of `plain`."""
    if _TEMPORAL.search(family):
        return "temporal_"
    return "text_" if _TEXT.search(family) and plain != "cross_" else plain


def _family(name: str) -> str:
    """The module that a linear is a part of: its parent, or the one above the lists and activations it is wrapped in."""
    return re.sub(r"(\.to_(add_)?out\.0|\.net\.\d+(\.proj)?|\.layers?\.\d+|\.\d+|\.[^.]+)$", "", name)


def _last_word(family: str) -> str:
    return family.rpartition(".")[2]


def _kind(leaf: str) -> str | None:
    return next((kind for kind, pattern in _LEAVES if pattern.match(leaf)), None)


def _crosses(name: str) -> bool:
    return "cross" in _last_word(name) or _last_word(name) == "attn2"


def _is_cross(name: str, module: nn.Module) -> bool:
    """Whether a module is a cross-attention: it says so, its keys are of another width, or by its name."""
    said = getattr(module, "is_cross_attention", None)
    if isinstance(said, bool):
        return said
    queries, keys = (getattr(module, leaf, None) for leaf in ("to_q", "to_k"))
    if isinstance(queries, nn.Linear) and isinstance(keys, nn.Linear) and queries.in_features != keys.in_features:
        return True
    return _crosses(name)
