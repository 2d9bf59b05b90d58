"""Bits for each layer under a number of bytes: the recipe with the least summed error that fits."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from trdq_core.errors import RecipeError
from trdq_core.plan import LayerInfo, matches, rule_for
from trdq_core.sensitivity.table import Cell, LayerSensitivity, Sensitivity
from trdq_core.specs import LayerRule, Recipe

Error = Literal["denoiser_error", "layer_error"]
Size = Literal["bytes", "packed_bytes"]
FRONTIER = 50_000  # partial choices kept at most; beyond it the search thins them out and states its gap
UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


class Option(NamedTuple):
    """One input group at one bit-width."""

    bits: str
    bytes: int
    error: float


class Choice(NamedTuple):
    """One input group in an allocation: its layers, what it got and what it weighs."""

    group: str
    layers: tuple[str, ...]
    role: str
    bits: str
    bytes: int
    error: float


class Allocation(NamedTuple):
    """The bits of every input group under a budget. `error` is at most `gap` above the least possible; 0 is exact."""

    choices: tuple[Choice, ...]
    budget: int
    bytes: int
    error: float
    gap: float
    recipe: Recipe


class _Point(NamedTuple):
    """A partial choice: its bytes, its error, what decides between equals, and the choices as linked pairs."""

    bytes: int
    error: float
    tie: int
    path: tuple[int, object] | None


def allocate(
    sensitivity: Sensitivity, budget: int, *, error: Error = "denoiser_error", size: Size = "bytes"
) -> Allocation:
    """The bits of each input group that minimise the summed error within `budget` bytes of quantized layers.

    Layers that read one tensor share its transform, so they get equal bits: a choice is made for each input group.
    More bits never count as worse than fewer, whatever the noise of a measurement; bytes left over go into bits.
    """
    groups = sensitivity.groups()
    options = {name: group_options(members, sensitivity.bits, error, size) for name, members in groups.items()}
    least = sum(min(option.bytes for option in choices) for choices in options.values())
    if budget < least:
        raise RecipeError(
            f"--bytes: got {budget:,}; the smallest choice among {', '.join(sensitivity.bits)} takes {least:,} bytes, "
            "give at least that."
        )
    picked, gap = search(list(options.values()), budget)
    choices = tuple(
        Choice(name, tuple(layer.layer for layer in groups[name]), groups[name][0].role, *options[name][index])
        for name, index in zip(options, picked, strict=True)
    )
    recipe = build_recipe(sensitivity, {choice.group: choice.bits for choice in choices}, budget)
    total, worst = sum(choice.bytes for choice in choices), sum(choice.error for choice in choices)
    return Allocation(choices, budget, total, worst, gap, recipe)


def group_options(
    members: Sequence[LayerSensitivity], bits: Sequence[str], error: Error = "denoiser_error", size: Size = "bytes"
) -> list[Option]:
    """The options of one input group, fewest bits first: bytes and errors of its layers added up.

    An error above that of an option with no more weight bits and no more activation bits is noise, and lowered to it.
    """
    found = []
    for label in sorted(bits, key=_widths):
        cells: list[Cell] = [layer.cells[label] for layer in members]
        found.append(Option(label, sum(getattr(c, size) for c in cells), sum(getattr(c, error) for c in cells)))
    return [
        option._replace(error=min(other.error for other in found if _within(other.bits, option.bits)))
        for option in found
    ]


def _widths(label: str) -> tuple[int, int]:
    weight, activation = re.findall(r"\d+", label)
    return int(weight), int(activation)


def _within(label: str, other: str) -> bool:
    return all(a <= b for a, b in zip(_widths(label), _widths(other), strict=True))


def search(groups: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float]:
    """The index of the best option of each group, and how far the error may be from the least possible.

    Dynamic programming over the groups, keeping every partial choice that no other beats in both bytes and error
    (Nemhauser and Ullmann 1969), so it is exact at the byte. Only above FRONTIER kept choices are some of them left out;
    the gap is then that to the Lagrangian lower bound.
    """
    rest = [0] * (len(groups) + 1)  # bytes that the groups from here on take at least
    for index in range(len(groups) - 1, -1, -1):
        rest[index] = rest[index + 1] + min(option.bytes for option in groups[index])
    points, thinned = [_Point(0, 0.0, 0, None)], False
    for index, options in enumerate(groups):
        grown = [
            _Point(
                point.bytes + option.bytes,
                point.error + option.error,
                point.tie - sum(_widths(option.bits)),
                (choice, point.path),
            )
            for point in points
            for choice, option in enumerate(options)
            if point.bytes + option.bytes + rest[index + 1] <= budget
        ]
        points = _best(grown)
        if len(points) > FRONTIER:
            points, thinned = [*points[:: -(-len(points) // FRONTIER)], points[-1]], True
    best = min(points, key=lambda point: (point.error, point.tie))
    picked: list[int] = []
    path = best.path
    while path is not None:
        choice, path = path  # type: ignore[assignment]
        picked.append(choice)
    gap = max(0.0, best.error - lower_bound(groups, budget)) if thinned else 0.0
    return picked[::-1], gap


def _best(points: list[_Point]) -> list[_Point]:
    """The points that no other beats in both bytes and error, fewest bytes first."""
    kept: list[_Point] = []
    for point in sorted(points):
        if not kept or (point.error, point.tie) < (kept[-1].error, kept[-1].tie):
            kept.append(point)
    return kept


def lower_bound(groups: Sequence[Sequence[Option]], budget: int) -> float:
    """An error that no choice within the budget goes below: the best Lagrangian bound, by bisection on the price of a byte."""
    spans = [(max(o.error for o in group) - min(o.error for o in group)) for group in groups]
    low, high = 0.0, sum(spans) + 1e-30  # a byte costs at most all the error there is
    bound = sum(min(option.error for option in group) for group in groups)
    for _ in range(100):
        price = (low + high) / 2
        picked = [min(group, key=lambda o: o.error + price * o.bytes) for group in groups]
        total = sum(option.bytes for option in picked)
        bound = max(bound, sum(option.error for option in picked) + price * (total - budget))
        low, high = (price, high) if total > budget else (low, price)
    return bound


def build_recipe(sensitivity: Sensitivity, bits: Mapping[str, str], budget: int) -> Recipe:
    """The recipe with one rule for each input group: that of the group's bit-width, its transforms kept.

    One rule covers all layers of a group, so that they go on sharing their transform. What is no layer's keeps the widest
    bits that were measured: a scan quantizes linears alone, so nothing is known of fewer bits for attention products.
    """
    widest = sensitivity.recipes[max(sensitivity.bits, key=_widths)]
    infos = [LayerInfo(x.layer, x.role, x.group, x.in_features, x.out_features) for x in sensitivity.layers]
    rules: list[LayerRule] = []
    for group, members in sensitivity.groups().items():
        recipe = sensitivity.recipes[bits[group]]
        info = next(info for info in infos if info.name == members[0].layer)
        rule = rule_for(info, recipe)
        if rule is None:
            raise RecipeError(f"{group}: the recipe {recipe.name} of the sensitivity table does not quantize it.")
        rules += _covering(rule, [member.layer for member in members], [member.role for member in members], infos)
    method = sensitivity.about.get("method", "mixed")
    products = widest.attention
    kept = f"; attention products at {products.bits} bits, softmax {products.softmax_bits}" if products else ""
    return dataclasses.replace(
        widest,
        name=f"{method}-{budget}-bytes",
        rules=tuple(rules),
        description=f"{method} with bits chosen for each layer within {budget:,} bytes{kept}.",
    )


def _covering(rule: LayerRule, names: list[str], roles: list[str], layers: Sequence[LayerInfo]) -> list[LayerRule]:
    """`rule` for exactly these layers: one rule by their common beginning and roles where that is exact, else one each."""
    each = [dataclasses.replace(rule, roles=(), match=glob.escape(name)) for name in names]
    if len(names) == 1:
        return each
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in alike)
    one = dataclasses.replace(rule, roles=tuple(dict.fromkeys(roles)), match=f"{glob.escape(prefix)}*")
    return [one] if [layer.name for layer in layers if matches(one, layer)] == names else each


def parse_bytes(text: str, sensitivity: Sensitivity) -> int:
    """A number of bytes: "3200000", "3.2MB", "3MiB", or "0.2", a share of the same layers in FP32."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise RecipeError(f"--bytes: got {text!r}; write bytes, 3.2MB, 3MiB, or a share of FP32 such as 0.2.")
    number, unit = float(found[1]), found[2].lower()
    if not unit and "." in found[1]:
        if not 0 < number <= 1:
            raise RecipeError(f"--bytes: got {text!r}; a share is above 0 and at most 1, other sizes take a unit.")
        return int(number * sum(4 * layer.in_features * layer.out_features for layer in sensitivity.layers))
    return int(number * UNITS[unit])
