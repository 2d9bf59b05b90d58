"""Named recipes: each method at any bit-width, by name."""

from __future__ import annotations

import dataclasses
import difflib
import re

from trdq_core.errors import RecipeError
from trdq_core.presets.methods import ALIASES, METHODS
from trdq_core.presets.peers import PREFIX, peer_recipe
from trdq_core.specs import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    Recipe,
    SharingSpec,
    Storage,
    TimeGroupKind,
    TimeGroupSpec,
)

OFFERED_BITS = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A4")


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
    """The recipe of a named method at the given bits. Methods that ignore time, or bring their own groups, keep them
    whatever `groups` says.

    `storage` defaults to "switched" where there are several groups: the exact method at the device memory of one set.
    """
    method = ALIASES.get(method, method)
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
    parts = chosen.build(weight_bits, activation_bits)
    time = parts.time or TimeGroupSpec()
    if parts.time is None and chosen.time_grouped:
        time = TimeGroupSpec(kind=group_kind, count=groups, edges=edges)
    several = chosen.time_grouped and (time.count > 1 or time.kind == "per_step" or bool(time.edges))
    return Recipe(
        name=f"{method}-w{weight_bits}a{activation_bits}",
        rules=parts.rules,
        time=time,
        storage=(storage or "switched") if several else "shared",
        attention=parts.attention,
        reconstruction=parts.reconstruction,
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
    """The recipe called like `tr-dq-w4a8`, `rtn-w8a8` or `fp`; bits left out mean W8A8. `peer-NAME` is another tool."""
    text = name.strip().lower().replace("peer:", PREFIX)
    if text.startswith(PREFIX):
        return peer_recipe(text.removeprefix(PREFIX))
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
