"""Named recipes: each published method as data, at any of the offered bit-widths."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import NamedTuple

from trdq_core.errors import RecipeError
from trdq_core.specs import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    LayerRule,
    QuantSpec,
    Recipe,
    SharingSpec,
    Storage,
    TimeGroupKind,
    TimeGroupSpec,
    TransformSpec,
)

# Linears inside transformer blocks. Embedders, modulation and the final projection stay in full precision, as in
# the released code of ViDiT-Q and TR-DQ: they are a few percent of the work and the most sensitive layers.
QUANTIZED_ROLES = (
    "self_q", "self_k", "self_v", "self_out",
    "cross_q", "cross_k", "cross_v", "cross_out",
    "mlp_in", "mlp_out",
)  # fmt: skip
OFFERED_BITS = ("W8A8", "W6A6", "W4A8", "W4A4")


class Method(NamedTuple):
    """A published method: one line for lists, its source, and the rule it sets for the quantized linears."""

    name: str
    description: str
    source: str
    rule: Callable[[int, int], LayerRule]
    time_grouped: bool = False


def _weight(bits: int, *, symmetric: bool = False) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=symmetric, granularity="channel")


def _per_token(bits: int, *, symmetric: bool = False) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=symmetric, granularity="token", dynamic=True)


def _rtn(weight_bits: int, activation_bits: int) -> LayerRule:
    return LayerRule(roles=QUANTIZED_ROLES, weight=_weight(weight_bits), activation=_per_token(activation_bits))


def _rtn_static(weight_bits: int, activation_bits: int) -> LayerRule:
    activation = QuantSpec(bits=activation_bits, symmetric=False, granularity="tensor")
    return LayerRule(roles=QUANTIZED_ROLES, weight=_weight(weight_bits), activation=activation)


def _smoothquant(weight_bits: int, activation_bits: int) -> LayerRule:
    return dataclasses.replace(
        _rtn(weight_bits, activation_bits), transforms=(TransformSpec(kind="smooth", alpha=0.5),)
    )


def _vidit_q(weight_bits: int, activation_bits: int) -> LayerRule:
    transforms = (TransformSpec(kind="smooth", alpha=0.11, absmax="ema", momentum=0.95), TransformSpec(kind="hadamard"))
    return dataclasses.replace(_rtn(weight_bits, activation_bits), transforms=transforms)


def _tr_dq(weight_bits: int, activation_bits: int) -> LayerRule:
    transforms = (
        TransformSpec(kind="smooth", alpha=0.11, absmax="ema", momentum=0.5),
        TransformSpec(kind="greedy_rotation"),
        TransformSpec(kind="serpentine"),
        TransformSpec(kind="greedy_rotation"),
    )
    return dataclasses.replace(_rtn(weight_bits, activation_bits), transforms=transforms)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("fp", "Full precision: the reference every picture is compared with.", "", lambda w, a: LayerRule()),
        Method(
            "rtn",
            "Round to nearest: per-channel weights, per-token activations, nothing else.",
            "common baseline",
            _rtn,
        ),
        Method(
            "rtn-static",
            "Round to nearest with one activation range per layer, fixed by calibration.",
            "common baseline",
            _rtn_static,
        ),
        Method(
            "smoothquant",
            "Moves outliers from activations into weights with one scale per channel.",
            "arXiv 2211.10438",
            _smoothquant,
        ),
        Method(
            "vidit-q",
            "Static channel balance, then a block Hadamard rotation, the same at every timestep.",
            "arXiv 2406.02540",
            _vidit_q,
        ),
        Method(
            "tr-dq",
            "Smoothing, two greedy rotations and a permutation, fitted for each group of timesteps.",
            "arXiv 2503.06564",
            _tr_dq,
            time_grouped=True,
        ),
    )
}


def make_recipe(
    method: str,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    groups: int = 1,
    group_kind: TimeGroupKind = "uniform",
    edges: tuple[float, ...] = (),
    storage: Storage | None = None,
) -> Recipe:
    """The recipe of a named method at the given bits. Methods that ignore time keep one group whatever `groups` says.

    `storage` defaults to "switched" where there are several groups: the exact method at the device memory of one set.
    """
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=1)
        hint = f", did you mean {close[0]}?" if close else "."
        raise RecipeError(f"recipe: got {method!r}; known methods are {', '.join(METHODS)}{hint}")
    chosen = METHODS[method]
    if method == "fp":
        return Recipe(name="fp", description=chosen.description)
    for label, bits, allowed in (
        ("weight", weight_bits, WEIGHT_BITS),
        ("activation", activation_bits, ACTIVATION_BITS),
    ):
        if bits not in allowed:
            raise RecipeError(f"{label} bits: got {bits}; allowed are {', '.join(map(str, allowed))}.")
    time = TimeGroupSpec(kind=group_kind, count=groups, edges=edges) if chosen.time_grouped else TimeGroupSpec()
    several = time.count > 1 or time.kind == "per_step" or bool(time.edges)
    return Recipe(
        name=f"{method}-w{weight_bits}a{activation_bits}",
        rules=(chosen.rule(weight_bits, activation_bits),),
        time=time,
        storage=(storage or "switched") if several else "shared",
        description=chosen.description,
        source=chosen.source,
    )


def parse_recipe(
    name: str,
    *,
    groups: int = 1,
    group_kind: TimeGroupKind = "uniform",
    edges: tuple[float, ...] = (),
    storage: Storage | None = None,
) -> Recipe:
    """The recipe called like `tr-dq-w4a8`, `rtn-w8a8` or `fp`; bits left out mean W8A8."""
    text = name.strip().lower()
    found = re.fullmatch(r"(.+?)(?:-w(\d+)a(\d+))?", text)
    if not text or found is None:
        raise RecipeError("recipe: the name is empty; write a method and bits, such as tr-dq-w4a8.")
    method, weight_bits, activation_bits = found.groups()
    return make_recipe(
        method,
        weight_bits=int(weight_bits or 8),
        activation_bits=int(activation_bits or 8),
        groups=groups,
        group_kind=group_kind,
        edges=edges,
        storage=storage,
    )


def published_sharing(blocks: int) -> SharingSpec:
    """The list in the released code of TR-DQ, blocks 0 to 7 and 22 to 27 of 28, scaled to a model of `blocks` blocks."""
    first, last = round(8 * blocks / 28), round(6 * blocks / 28)
    chosen = sorted({*range(first), *range(blocks - last, blocks)})
    return SharingSpec(blocks=(tuple(chosen),), description="the list of the released TR-DQ, scaled to the depth")


def with_sharing(recipe: Recipe, sharing: SharingSpec) -> Recipe:
    """`recipe` with attention sharing, under a name that says so."""
    return dataclasses.replace(recipe, name=f"{recipe.name}+sharing", sharing=sharing)
