"""The dry run: which linear gets which kernel, what it will weigh, what is left alone and why. No weight is touched."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trdq_core.errors import RecipeError
from trdq_core.kernels import dispatch
from trdq_core.specs import LayerRule, Recipe
from trdq_core.transforms.rotation import choose_block

PANEL = 64  # kernels pad the outputs of a packed weight to whole panels


class LayerInfo(NamedTuple):
    """A linear of the denoiser. `leader` is the first linear that reads the same input tensor; `bias` adds FP bytes."""

    name: str
    role: str
    leader: str
    in_features: int
    out_features: int


class LayerPlan(NamedTuple):
    """What will happen to one linear. Bytes count weights, scales and its share of the input transform; the bias stays."""

    layer: str
    role: str
    in_features: int
    out_features: int
    action: str  # "quantize" or "keep"
    reason: str
    weight_bits: int | None
    activation_bits: int | None
    transforms: str
    sets: int
    kernel: str
    simulated: bool
    fp_bytes: int
    weight_bytes: int


class Plan(NamedTuple):
    """All linears and the totals. `resident_bytes` stay in memory, `disk_bytes` is what switched storage keeps in a file."""

    layers: tuple[LayerPlan, ...]
    fp_bytes: int
    weight_bytes: int  # quantized layers, one set
    resident_bytes: int  # quantized layers, all resident sets
    disk_bytes: int
    effective_bits: float
    notes: tuple[str, ...]


class InputGroup(NamedTuple):
    """Linears that read one tensor under one rule, and so share one transform. The first owns it."""

    statistics_name: str
    layers: tuple[LayerInfo, ...]
    rule: LayerRule


def rule_for(layer: LayerInfo, recipe: Recipe) -> LayerRule | None:
    """The first rule of `recipe` that matches a layer and quantizes it, None if the layer stays in full precision."""
    for rule in recipe.rules:
        if (not rule.roles or layer.role in rule.roles) and fnmatch.fnmatch(layer.name, rule.match):
            return rule if rule.weight is not None else None
    return None


def group_inputs(layers: Iterable[LayerInfo], recipe: Recipe) -> list[InputGroup]:
    """The quantized linears, grouped by the tensor they read and the rule they follow, in model order."""
    groups: dict[tuple[str, int], list[LayerInfo]] = {}
    rules: dict[int, LayerRule] = {}
    for layer in layers:
        rule = rule_for(layer, recipe)
        if rule is not None:
            rules[id(rule)] = rule
            groups.setdefault((layer.leader, id(rule)), []).append(layer)
    return [InputGroup(leader, tuple(members), rules[key]) for (leader, key), members in groups.items()]


def set_count(recipe: Recipe, steps: int) -> int:
    """How many sets of transforms and weights a recipe has: one if shared, else one for each time group."""
    if recipe.storage == "shared":
        return 1
    return recipe.time.groups_in(steps)


def make_plan(layers: Sequence[LayerInfo], recipe: Recipe, *, steps: int = 20, backend: dispatch.Backend) -> Plan:
    """The plan table of `recipe` for a model's linears; RecipeError or ShapeError if a layer cannot take its rule."""
    if recipe.quantized and not any(rule_for(layer, recipe) for layer in layers):
        raise RecipeError(f"{recipe.name}: no linear of this model matches a rule; check roles and match patterns.")
    sets = set_count(recipe, steps)
    planned: dict[str, LayerPlan] = {}
    for group in group_inputs(layers, recipe):
        for row in _plan_group(group, sets, recipe, backend):
            planned[row.layer] = row
    rows = tuple(planned.get(layer.name) or _kept(layer, recipe) for layer in layers)
    quantized = [row for row in rows if row.action == "quantize"]
    fp_bytes, one_set = sum(r.fp_bytes for r in quantized), sum(r.weight_bytes for r in quantized)
    resident = one_set * (sets if recipe.storage == "resident" else 1)
    return Plan(
        layers=rows,
        fp_bytes=fp_bytes,
        weight_bytes=one_set,
        resident_bytes=resident,
        disk_bytes=one_set * sets if recipe.storage == "switched" and sets > 1 else 0,
        effective_bits=32 * resident / fp_bytes if fp_bytes else 32.0,
        notes=_notes(recipe, steps, sets, one_set),
    )


def _plan_group(group: InputGroup, sets: int, recipe: Recipe, backend: dispatch.Backend) -> list[LayerPlan]:
    rule = group.rule
    if rule.weight is None or rule.activation is None:
        return []
    channels = group.layers[0].in_features
    shared_bytes, words = _transform_price(group)
    storage_bits = 4 if rule.weight.bits == 4 else 8
    sizes = {"in_features": channels, "group_size": rule.weight.group_size or 0}
    rows = []
    for index, layer in enumerate(group.layers):
        padded = -(-layer.out_features // PANEL) * PANEL
        scales = 4 * layer.out_features * (2 if rule.weight.symmetric else 3)
        if rule.weight.group_size:
            scales += padded * channels // rule.weight.group_size
        rows.append(
            LayerPlan(
                layer=layer.name,
                role=layer.role,
                in_features=channels,
                out_features=layer.out_features,
                action="quantize",
                reason=f"shares the transform of {group.layers[0].name}" if index and rule.transforms else "",
                weight_bits=rule.weight.bits,
                activation_bits=rule.activation.bits,
                transforms=words,
                sets=sets,
                kernel=dispatch.kernel_name(storage_bits, rule.activation.bits, backend, **sizes),
                simulated=dispatch.is_simulated(backend, **sizes),
                fp_bytes=4 * channels * layer.out_features,
                weight_bytes=padded * channels * storage_bits // 8 + scales + (shared_bytes if index == 0 else 0),
            )
        )
    return rows


def _transform_price(group: InputGroup) -> tuple[int, str]:
    """Bytes of the transform one set needs, and its description; checks that every block fits the width."""
    channels = group.layers[0].in_features
    outputs = sum(layer.out_features for layer in group.layers)
    dense = any(spec.kind == "greedy_rotation" for spec in group.rule.transforms)
    static = group.rule.activation is not None and not group.rule.activation.dynamic
    total, words = (8 if static else 0), []  # one scale and one zero point
    for spec in group.rule.transforms:
        if spec.kind == "smooth":
            total, words = total + 4 * channels, [*words, "scale"]
            continue
        block = choose_block(channels, outputs, spec.block, dense=dense, layer=group.layers[0].name)
        if spec.kind == "greedy_rotation":
            total, words = total + 2 * block * block, [*words, f"R{block}"]
        elif spec.kind == "serpentine":
            total, words = total + 4 * channels, [*words, "permute"]
        else:
            words = [*words, f"H{block}"]
    return total, ", ".join(words) or "none"


def _kept(layer: LayerInfo, recipe: Recipe) -> LayerPlan:
    reasons = {
        "embed": "embedder: runs once a step and is sensitive",
        "modulation": "modulation: a few rows a step, and its errors scale every channel",
        "final": "final projection: its error goes straight into the latents",
        "other": "its role could not be told from the model's structure",
    }
    reason = reasons.get(layer.role, "no rule of the recipe names its role") if recipe.quantized else "full precision"
    fp_bytes = 4 * layer.in_features * layer.out_features
    return LayerPlan(
        layer.name, layer.role, layer.in_features, layer.out_features,
        "keep", reason, None, None, "none", 1, "float", False, fp_bytes, fp_bytes,
    )  # fmt: skip


def _notes(recipe: Recipe, steps: int, sets: int, one_set: int) -> tuple[str, ...]:
    notes = []
    if recipe.storage == "shared" and recipe.time.groups_in(steps) > 1:
        notes.append("shared storage: one transform is fitted on all groups together, an approximation of the method.")
    if recipe.storage == "resident" and sets > 1:
        notes.append(f"resident storage: all {sets} sets of packed weights stay in memory.")
    if recipe.storage == "switched" and sets > 1:
        notes.append(
            f"switched storage: one set of {one_set / 2**20:.1f} MiB in memory, {sets} in a file; {sets - 1} swaps a run."
        )
    if any(rule.weight is not None and rule.weight.bits == 6 for rule in recipe.rules):
        notes.append("6-bit weights are stored as int8: their quality is that of 6 bits, their size that of 8.")
    if any(rule.activation is not None and rule.activation.bits < 8 for rule in recipe.rules):
        notes.append("Activations below 8 bits run through the int8 product: real integers, no further speed.")
    return tuple(notes)
