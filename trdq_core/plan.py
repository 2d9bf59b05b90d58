"""The dry run: which linear gets which kernel, what it will weigh, what is left alone and why. No weight is touched."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trdq_core.errors import RecipeError, ShapeError
from trdq_core.kernels import dispatch
from trdq_core.specs import LayerRule, Recipe
from trdq_core.transforms.steps import price

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
        if matches(rule, layer):
            return rule if rule.weight is not None else None
    return None


def matches(rule: LayerRule, layer: LayerInfo) -> bool:
    """Whether a rule speaks of a layer, by its role and its name."""
    return (not rule.roles or layer.role in rule.roles) and fnmatch.fnmatch(layer.name, rule.match)


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
    if recipe.peer is not None:
        raise RecipeError(
            f"{recipe.name}: another tool makes its own plan; measure it with profile, compare or evaluate."
        )
    if recipe.quantized and not any(rule_for(layer, recipe) for layer in layers):
        raise RecipeError(f"{recipe.name}: no linear of this model matches a rule; check roles and match patterns.")
    sets = set_count(recipe, steps)
    planned: dict[str, LayerPlan] = {}
    for group in group_inputs(layers, recipe):
        for row in _plan_group(group, sets, recipe.time.groups_in(steps), backend):
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


def _plan_group(group: InputGroup, sets: int, groups: int, backend: dispatch.Backend) -> list[LayerPlan]:
    rule = group.rule
    if rule.weight is None:
        return []
    channels = group.layers[0].in_features
    check_shapes(group)
    shared_bytes, words = _transform_price(group, groups)
    activation_bits = 16 if rule.activation is None else rule.activation.bits
    storage_bits = 4 if rule.weight.bits <= 4 else 8
    sizes = {"in_features": channels, "group_size": rule.weight.group_size or 0}
    kernel = (
        dispatch.kernel_name(storage_bits, activation_bits, backend, **sizes)
        if rule.integer
        else (f"simulated float32 (W{rule.weight.bits}A{activation_bits})")
    )
    rows = []
    for index, layer in enumerate(group.layers):
        rank = 2 * rule.low_rank.rank * layer.out_features if rule.low_rank is not None else 0
        rows.append(
            LayerPlan(
                layer=layer.name,
                role=layer.role,
                in_features=channels,
                out_features=layer.out_features,
                action="quantize",
                reason=f"shares the transform of {group.layers[0].name}" if index and any(rule.chains) else "",
                weight_bits=rule.weight.bits,
                activation_bits=activation_bits,
                transforms=words,
                sets=sets,
                kernel=kernel,
                simulated=not rule.integer or dispatch.is_simulated(backend, **sizes),
                fp_bytes=4 * channels * layer.out_features,
                weight_bytes=_weight_bytes(layer, rule) + rank + (shared_bytes if index == 0 else 0),
            )
        )
    return rows


def check_shapes(group: InputGroup) -> None:
    """ShapeError, with the layer named, where a group size does not divide the width of the input, or a branch of small rank
    has no smaller rank than the weights it stands beside, all that read the input together."""
    layer, rule = group.layers[0], group.rule
    for label, spec in (("weight", rule.weight), ("activation", rule.activation)):
        if spec is not None and spec.group_size is not None and layer.in_features % spec.group_size:
            sizes = ", ".join(map(str, _nearest_divisors(layer.in_features, spec.group_size)))
            raise ShapeError(
                f"{layer.name}: {label} group_size={spec.group_size} does not divide in_features={layer.in_features}; "
                f"use one of {sizes}, or another granularity."
            )
    largest = min(layer.in_features, sum(each.out_features for each in group.layers))
    if rule.low_rank is not None and rule.low_rank.rank > largest:
        raise ShapeError(
            f"{layer.name}: low_rank rank={rule.low_rank.rank} is more than the {largest} that its weight of "
            f"{layer.in_features} channels has; use at most {largest}, or leave low_rank out for it."
        )


def _nearest_divisors(width: int, wanted: int) -> list[int]:
    """The group sizes nearest to `wanted` that divide `width`, rising; `width` itself is one scale a row."""
    divisors = [size for size in range(2, width + 1) if width % size == 0]
    return sorted(sorted(divisors, key=lambda size: abs(size - wanted))[:4])


def _weight_bytes(layer: LayerInfo, rule: LayerRule) -> int:
    """Bytes of the weight of one set with its scales: in panels for the integer kernels, else as bit-packed codes."""
    assert rule.weight is not None  # only quantized layers are priced
    channels, outputs, spec = layer.in_features, layer.out_features, rule.weight
    groups = channels // spec.group_size if spec.group_size else 1
    if not rule.integer:
        parameters = 1 if spec.symmetric and spec.grid == "uniform" else 2
        return -(-channels * outputs * spec.bits // 8) + 4 * outputs * groups * parameters
    padded = -(-outputs // PANEL) * PANEL
    scales = 4 * outputs * (2 if spec.symmetric else 3) + (padded * groups if spec.group_size else 0)
    return padded * channels * (4 if spec.bits <= 4 else 8) // 8 + scales


def _transform_price(group: InputGroup, groups: int) -> tuple[int, str]:
    """Bytes of what one set keeps for the input, and its description; checks that every block fits the width.

    Of several chains to choose from the dearest counts.
    """
    activation, low_rank = group.rule.activation, group.rule.low_rank
    total = 0
    if activation is not None and not activation.dynamic and activation.grid == "uniform":
        total += 8 * (groups if activation.per_time_group else 1)  # one scale and one zero point
    if low_rank is not None:
        total += 2 * low_rank.rank * group.layers[0].in_features
    channels, outputs = group.layers[0].in_features, sum(layer.out_features for layer in group.layers)
    prices = [price(chain, channels, outputs, layer=group.layers[0].name) for chain in group.rule.chains]
    words = " or ".join(dict.fromkeys(each.words for each in prices))
    return total + max(each.nbytes for each in prices), words


def _kept(layer: LayerInfo, recipe: Recipe) -> LayerPlan:
    reasons = {
        "embed": "embedder: runs once a step and is sensitive",
        "modulation": "modulation: a few rows a step, and its errors scale every channel",
        "final": "final projection: its error goes straight into the latents",
        "uncalled": "sampling never calls it as a layer, so nothing is known of its input",
        "skip": "long skip connection: its input is two streams of different size side by side",
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
    if recipe.storage == "shared" and recipe.time.groups_in(steps) > 1 and any(any(r.chains) for r in recipe.rules):
        notes.append("shared storage: one transform is fitted on all groups together, an approximation of the method.")
    if recipe.storage == "resident" and sets > 1:
        notes.append(f"resident storage: all {sets} sets of packed weights stay in memory.")
    if recipe.storage == "switched" and sets > 1:
        notes.append(
            f"switched storage: one set of {one_set / 2**20:.1f} MiB in memory, {sets} in a file; {sets - 1} swaps a run."
        )
    real = [rule for rule in recipe.rules if rule.weight is not None and rule.integer]
    for bits in sorted({rule.weight.bits for rule in real if rule.weight is not None} - {4, 8}):
        stored = 4 if bits < 4 else 8
        notes.append(
            f"{bits}-bit weights are stored as int{stored}: their quality is that of {bits} bits, their size that of {stored}."
        )
    if any(rule.weight is not None and not rule.integer for rule in recipe.rules) or recipe.simulated_attention:
        notes.append(
            "Simulated: no integer kernel takes all of these grids, so there are no times; sizes are of packed codes."
        )
    if recipe.attention is not None and recipe.attention.live:
        notes.append(
            "Attention products are int8 where the CPU kernels run the attention; everywhere else it is exact."
        )
    if any(rule.activation is not None and rule.activation.bits < 8 for rule in recipe.rules):
        notes.append("Activations below 8 bits run through the int8 product: real integers, no further speed.")
    return tuple(notes)
