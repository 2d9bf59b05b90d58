"""The methods of the field, each as the data a recipe is made of. docs/methods.md has a paragraph and the source of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from trdq_core.specs import (
    AttentionSpec,
    LayerRule,
    LowRankSpec,
    QuantSpec,
    ReconstructionSpec,
    TimeGroupSpec,
    TransformSpec,
)

# Linears inside transformer blocks. Embedders, modulation and the final projection stay in full precision, as in
# the released code of ViDiT-Q and TR-DQ: they are a few percent of the work and the most sensitive layers.
SPATIAL_ROLES = (
    "self_q", "self_k", "self_v", "self_out",
    "cross_q", "cross_k", "cross_v", "cross_out",
    "mlp_in", "mlp_out",
)  # fmt: skip
TEMPORAL_ROLES = (
    "temporal_q", "temporal_k", "temporal_v", "temporal_out", "temporal_mlp_in", "temporal_mlp_out",
)  # fmt: skip
# The stream of text tokens in blocks where text and picture attend jointly (MMDiT), and blocks for text alone.
TEXT_ROLES = ("text_q", "text_k", "text_v", "text_out", "text_mlp_in", "text_mlp_out")
# One linear for several of the above: queries, keys, values and feed-forward; attention's and feed-forward's way out.
FUSED_ROLES = ("fused_in", "fused_out")
QUANTIZED_ROLES = (*SPATIAL_ROLES, *TEMPORAL_ROLES, *TEXT_ROLES, *FUSED_ROLES)
MLP_OUT_ROLES = ("mlp_out", "temporal_mlp_out", "text_mlp_out")

SMOOTH = TransformSpec(kind="smooth", alpha=0.5)
SERPENTINE = TransformSpec(kind="serpentine")
HADAMARD = TransformSpec(kind="hadamard")
GREEDY = TransformSpec(kind="greedy_rotation")
DUAL = (GREEDY, SERPENTINE, GREEDY)


class Ingredients(NamedTuple):
    """What a method puts into a recipe; with `time` it brings its own time groups."""

    rules: tuple[LayerRule, ...]
    attention: AttentionSpec | None = None
    reconstruction: ReconstructionSpec | None = None
    time: TimeGroupSpec | None = None


class Method(NamedTuple):
    """A published method: one line for lists, its source, and what it puts into a recipe at given bits."""

    name: str
    description: str
    source: str
    build: Callable[[int, int], Ingredients]
    time_grouped: bool = False  # transforms and weights for each time group


def rule(weight: QuantSpec, activation: QuantSpec | None, *transforms: TransformSpec, **changes: object) -> LayerRule:
    """A rule for the linears inside blocks."""
    fields: dict = {"roles": QUANTIZED_ROLES, "weight": weight, "activation": activation, "transforms": transforms}
    return LayerRule(**(fields | changes))


def per_channel(bits: int, **changes: object) -> QuantSpec:
    """Weights with a scale and a zero point for each output channel."""
    return dataclasses.replace(QuantSpec(bits=bits, symmetric=False, granularity="channel"), **changes)


def per_token(bits: int, **changes: object) -> QuantSpec:
    """Activations with a scale and a zero point for each token, from the live values."""
    return dataclasses.replace(QuantSpec(bits=bits, symmetric=False, granularity="token", dynamic=True), **changes)


def static(bits: int, **changes: object) -> QuantSpec:
    """Activations with one calibrated range for a whole tensor."""
    return dataclasses.replace(QuantSpec(bits=bits, symmetric=False, granularity="tensor"), **changes)


def groups_of(bits: int, size: int, **changes: object) -> QuantSpec:
    """A scale for every `size` neighbouring input channels of a row."""
    return dataclasses.replace(QuantSpec(bits=bits, granularity="group", group_size=size), **changes)


def _rtn(w: int, a: int) -> Ingredients:
    return Ingredients((rule(per_channel(w), per_token(a)),))


def _rtn_mse(w: int, a: int) -> Ingredients:
    return Ingredients((rule(per_channel(w, range="mse"), per_token(a)),))


def _rtn_static(w: int, a: int) -> Ingredients:
    return Ingredients((rule(per_channel(w), static(a)),))


def _smoothquant(w: int, a: int) -> Ingredients:
    return Ingredients((rule(per_channel(w), per_token(a), SMOOTH),))


def _quarot(w: int, a: int) -> Ingredients:
    hadamard = TransformSpec(kind="hadamard", random_signs=True)
    weight = per_channel(w, symmetric=True, range="mse")
    return Ingredients((rule(weight, per_token(a, symmetric=True, clip=0.9), hadamard, rounding="gptq"),))


def _duquant(w: int, a: int) -> Ingredients:
    smooth = TransformSpec(kind="smooth", alpha=0.6)
    return Ingredients((rule(per_channel(w, clip=0.8), per_token(a, clip=0.9), smooth, *DUAL),))


def _vidit_q(w: int, a: int) -> Ingredients:
    smooth = TransformSpec(kind="smooth", alpha=0.11, absmax="ema", momentum=0.95)
    return Ingredients((rule(per_channel(w), per_token(a), smooth, HADAMARD),))


def _q_dit(w: int, a: int) -> Ingredients:
    weight = groups_of(w, 128, symmetric=False)
    return Ingredients((rule(weight, groups_of(a, 128, symmetric=False, dynamic=True), rounding="gptq"),))


def _svdquant(w: int, a: int) -> Ingredients:
    smooth = TransformSpec(kind="smooth", alpha=None)
    # 8 bits are per channel and token there, as in its own W8A8 rows; groups of 64 are for fewer.
    weight = per_channel(w, symmetric=True) if w == 8 else groups_of(w, 64)
    activation = per_token(a, symmetric=True) if a == 8 else groups_of(a, 64, dynamic=True)
    return Ingredients((rule(weight, activation, smooth, rounding="gptq", low_rank=LowRankSpec(rank=32)),))


def _q_diffusion(w: int, a: int) -> Ingredients:
    learned = rule(per_channel(w, range="mse"), static(a, range="mse"), rounding="adaround")
    return Ingredients((learned,), AttentionSpec(bits=a), ReconstructionSpec())


def _ptq4dit(w: int, a: int) -> Ingredients:
    balance = TransformSpec(kind="smooth", alpha=0.5, absmax="spearman")
    learned = rule(per_channel(w, range="mse"), static(a, range="mse"), balance, rounding="adaround")
    return Ingredients((learned,), AttentionSpec(bits=a), ReconstructionSpec())


def _tfmq_dm(w: int, a: int) -> Ingredients:
    weight, activation = per_channel(w, range="mse"), static(a, range="ema", per_time_group=True)
    rules = (
        rule(weight, activation, rounding="adaround", roles=("modulation",)),
        rule(weight, activation, rounding="adaround", roles=("embed",), match="*time*"),
        rule(weight, activation, rounding="adaround"),
    )
    reconstruction = ReconstructionSpec(temporal_block=True)
    return Ingredients(rules, AttentionSpec(bits=a), reconstruction, TimeGroupSpec(kind="per_step"))


def _tq_dit(w: int, a: int) -> Ingredients:
    weight = QuantSpec(bits=w, granularity="tensor", range="output")
    twin = QuantSpec(bits=a, grid="twin_region", granularity="tensor", range="mse")
    rules = (
        rule(weight, twin, roles=MLP_OUT_ROLES),
        rule(weight, QuantSpec(bits=a, granularity="tensor", range="output")),
    )
    attention = AttentionSpec(bits=a, softmax_bits=a, softmax_grid="twin_region", per_time_group=True)
    return Ingredients(rules, attention, time=TimeGroupSpec(count=10))


def _lrq_dit(w: int, a: int) -> Ingredients:
    weight = QuantSpec(bits=w, grid="twin_log", granularity="channel", range="mse")
    adaptive = TransformSpec(kind="adaptive_rotation", threshold=1.0)
    return Ingredients((rule(weight, per_token(a, symmetric=True), SMOOTH, adaptive),))


def _tr_dq(w: int, a: int) -> Ingredients:
    smooth = TransformSpec(kind="smooth", alpha=0.11, absmax="ema", momentum=0.5)
    return Ingredients((rule(per_channel(w), per_token(a), smooth, *DUAL),))


def _tr_dq_int8_attention(w: int, a: int) -> Ingredients:
    return _tr_dq(w, a)._replace(attention=AttentionSpec(live=True))


def _tr_dq_release_opensora(w: int, a: int) -> Ingredients:
    return _tr_dq(w, a)._replace(time=TimeGroupSpec(count=20))


def _tr_dq_release_pixart(w: int, a: int) -> Ingredients:
    smooth = TransformSpec(kind="smooth", alpha=0.3, absmax="ema", momentum=0.95)
    plain = rule(per_channel(w), per_token(a))
    rules = (
        dataclasses.replace(plain, match="*.27.ff.net.2", transforms=(smooth, *DUAL)),
        dataclasses.replace(plain, roles=("mlp_in", "mlp_out"), transforms=DUAL),
        plain,
    )
    return Ingredients(rules)


def _tr_dq_plus(w: int, a: int) -> Ingredients:
    chain = (
        TransformSpec(kind="smooth", alpha=None, absmax="spearman"),
        SERPENTINE,
        TransformSpec(kind="hadamard", random_signs=True),
    )
    activation = per_token(a, range="mse" if a < 8 else "minmax")
    return Ingredients((rule(per_channel(w, range="mse"), activation, *chain, rounding="gptq"),))


def _tr_dq_plus_low_rank(w: int, a: int) -> Ingredients:
    (plain,) = _tr_dq_plus(w, a).rules
    weight = groups_of(w, 64, range="mse") if w == 4 else plain.weight
    return Ingredients(
        (dataclasses.replace(plain, weight=weight, low_rank=LowRankSpec(rank=30, iterations=6, refit=True)),)
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "fp", "Full precision: the reference every picture is compared with.", "", lambda w, a: Ingredients(())
        ),
        Method(
            "rtn", "Round to nearest: per-channel weights, per-token activations, nothing else.",
            "common baseline", _rtn,
        ),
        Method(
            "rtn-mse", "Round to nearest with weight ranges clipped for the least squared error.",
            "common baseline", _rtn_mse,
        ),
        Method(
            "rtn-static", "Round to nearest with one activation range per layer, fixed by calibration.",
            "common baseline", _rtn_static,
        ),
        Method(
            "smoothquant", "Moves outliers from activations into weights with one scale per channel.",
            "arXiv 2211.10438", _smoothquant,
        ),
        Method(
            "quarot", "Random Hadamard rotation before every linear, clipped activations, GPTQ.",
            "arXiv 2404.00456", _quarot,
        ),
        Method(
            "duquant", "Smoothing, then two greedy rotations around a permutation, clipped ranges.",
            "arXiv 2406.01721", _duquant,
        ),
        Method(
            "svdquant", "A low-rank branch takes the hard part of the weight, groups of 64 the rest.",
            "arXiv 2411.05007", _svdquant,
        ),
        Method(
            "q-dit", "Scales for groups of 128 channels of weights and live activations, GPTQ.",
            "arXiv 2406.17343", _q_dit,
        ),
        Method(
            "q-diffusion", "Static activations, rounding learnt block by block over all timesteps.",
            "arXiv 2302.04304", _q_diffusion,
        ),
        Method(
            "ptq4dit", "Balances channels by how salient they are over time, then learns the rounding.",
            "arXiv 2405.16005", _ptq4dit,
        ),
        Method(
            "tfmq-dm", "Activation ranges for each timestep, time embedding reconstructed on its own.",
            "arXiv 2311.16503", _tfmq_dm,
        ),
        Method(
            "tq-dit", "Two-region grids for softmax and GELU, scales weighted by curvature, attention quantized.",
            "arXiv 2502.04056", _tq_dit,
        ),
        Method(
            "lrq-dit", "Logarithmic weight levels on both sides of zero, rotation chosen by the input's size.",
            "arXiv 2508.03485", _lrq_dit,
        ),
        Method(
            "vidit-q", "Static channel balance, then a block Hadamard rotation, the same at every timestep.",
            "arXiv 2406.02540", _vidit_q,
        ),
        Method(
            "tr-dq-release-pixart", "The released TR-DQ setting for PixArt: no time groups, rotation in the MLP only.",
            "arXiv 2503.06564", _tr_dq_release_pixart,
        ),
        Method(
            "tr-dq-release-opensora", "The released TR-DQ setting for OpenSora: twenty time groups.",
            "arXiv 2503.06564", _tr_dq_release_opensora, time_grouped=True,
        ),
        Method(
            "tr-dq", "Smoothing, two greedy rotations and a permutation, fitted for each group of timesteps.",
            "arXiv 2503.06564", _tr_dq, time_grouped=True,
        ),
        Method(
            "tr-dq-int8-attention", "TR-DQ with int8 attention products too, where the CPU kernels run the attention.",
            "arXiv 2503.06564", _tr_dq_int8_attention, time_grouped=True,
        ),
        Method(
            "tr-dq-plus", "Ours: searched smoothing, permutation and Hadamard for each time group, clip search, GPTQ.",
            "this project", _tr_dq_plus, time_grouped=True,
        ),
        Method(
            "tr-dq-plus-low-rank", "Ours with a low-rank branch and groups of 64: more bits a weight, less error.",
            "this project", _tr_dq_plus_low_rank, time_grouped=True,
        ),
    )
}  # fmt: skip
ALIASES = {"rtn-dynamic": "rtn"}
