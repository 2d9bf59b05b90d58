"""A plan changed layer by layer: other bits or full precision for some layers of a recipe, and what that weighs."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from studio.services import models
from studio.services.form import whole
from studio.services.plans import Plans
from trdq_core.bitwidths import split_name
from trdq_core.errors import RecipeError
from trdq_core.presets import METHODS
from trdq_core.specs import ACTIVATION_BITS, WEIGHT_BITS, LayerRule, Recipe

EVERY, ROLE = "*", "role:"  # what a picker may hold besides layers' names
Errors = Mapping[str, Mapping[str, float]]  # of the prediction, by layer and bit label


class Bits(NamedTuple):
    """Bits of one layer."""

    weight: int
    activation: int

    @property
    def label(self) -> str:
        """ "W4A8" """
        return f"W{self.weight}A{self.activation}"


Change = Bits | None  # None: full precision


@dataclass(frozen=True)
class Edit:
    """A recipe and what was changed in it; kept on the server."""

    model: str
    base: Recipe
    steps: int = 20
    changes: Mapping[str, Change] = field(default_factory=dict)  # by layer
    origin: str = ""  # the command that made the base, if one did

    @property
    def method(self) -> str | None:
        """The published method whose rules are asked for other bits; nothing if the recipe is of no method."""
        name = split_name(self.base.name)[0]
        return name if name in METHODS else None


class EditedLayer(NamedTuple):
    """One layer of the plan. `error` is what a scan measured for its bits: 0 in full precision, None if it did not."""

    layer: str
    role: str
    bits: Change
    transforms: str
    kernel: str
    simulated: bool
    fp_bytes: int
    bytes: int
    error: float | None
    changed: bool


class EditedPlan(NamedTuple):
    """The edited plan; totals are over the layers that the recipe quantizes where nothing is changed."""

    edit: Edit
    recipe: Recipe
    layers: tuple[EditedLayer, ...]
    fp_bytes: int
    bytes: int
    resident_bytes: int  # with every resident set
    effective_bits: float  # a weight, layers in full precision counted with 32
    skipped: int
    error: float | None  # sum over the layers; None without a scan
    unmeasured: int  # layers whose bits the scan has not
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Edits:
    """Plans of changed recipes, over the core's own plan."""

    plans: Plans

    def start(self, model: str, recipe: Recipe, steps: Any, origin: str = "") -> Edit:
        """A recipe with nothing changed; TRDQError if it quantizes nothing or does not fit the model."""
        models.check(self.plans.core, model)
        if not recipe.quantized:
            raise RecipeError(f"{recipe.name}: it quantizes nothing, so there are no bits to choose.")
        edit = Edit(model, recipe, whole("steps", steps, 2, 200), origin=origin)
        self._plan(edit, recipe)
        return edit

    def change(self, edit: Edit, picked: Any, to: Change) -> Edit:
        """The picked layers with other bits, or in full precision."""
        names = self.picked(edit, picked)
        if to is not None:
            _check_bits(to)
        changed = replace(edit, changes={**edit.changes, **dict.fromkeys(names, to)})
        rows = self._base_rows(edit)
        if all(changed.changes.get(row.layer, _bits_of(row)) is None for row in rows):
            raise RecipeError("skip: every layer would stay in full precision; leave at least one quantized.")
        return _tidied(changed, rows)

    def undo(self, edit: Edit, picked: Any) -> Edit:
        """The picked layers as the recipe has them."""
        names = set(self.picked(edit, picked))
        return replace(edit, changes={name: to for name, to in edit.changes.items() if name not in names})

    def picked(self, edit: Edit, picked: Any) -> list[str]:
        """The names of the picked layers in model order; RecipeError if there are none, or one that cannot be changed."""
        rows = self._base_rows(edit)
        words = {str(word) for word in picked or ()}
        if not words:
            raise RecipeError("layers: none is picked; click on a line of the table, or choose layers or a role.")
        known = {EVERY, *(ROLE + row.role for row in rows), *(row.layer for row in rows)}
        if unknown := sorted(words - known):
            raise RecipeError(
                f"layers: {unknown[0][:80]} is none that {edit.base.name} quantizes; pick another, or start from another recipe."
            )
        return [row.layer for row in rows if {EVERY, ROLE + row.role, row.layer} & words]

    def offered(self, edit: Edit) -> list[tuple[str, str]]:
        """What can be picked: every layer, a role, one layer."""
        rows = self._base_rows(edit)
        roles = dict.fromkeys(row.role for row in rows)
        single = [(_short(row.layer), row.layer) for row in rows]
        return [("every layer", EVERY), *((f"role {role}", ROLE + role) for role in roles), *single]

    def view(self, edit: Edit, errors: Errors | None = None) -> EditedPlan:
        """The plan of the edited recipe with its totals; `errors` are those of a scan."""
        recipe = self.recipe(edit)
        plan = self._plan(edit, recipe)
        own = {row.layer for row in self._base_rows(edit)}
        layers = tuple(_edited(row, edit, errors or {}) for row in plan.layers if row.layer in own)
        packed, fp_bytes = sum(layer.bytes for layer in layers), sum(layer.fp_bytes for layer in layers)
        kept = sum(layer.bytes for layer in layers if layer.bits is None)
        known = [layer.error for layer in layers if layer.error is not None]
        return EditedPlan(
            edit, recipe, layers, fp_bytes, packed, int(plan.resident_bytes) + kept, 32 * packed / max(1, fp_bytes),
            sum(layer.bits is None for layer in layers), sum(known) if errors else None,
            len(layers) - len(known) if errors else 0, tuple(plan.notes),
        )  # fmt: skip

    def recipe(self, edit: Edit) -> Recipe:
        """The recipe with one more rule for each set of changed layers, before its own rules."""
        if not edit.changes:
            return edit.base
        rows = {row.layer: row for row in self._base_rows(edit)}
        wanted: dict[tuple[LayerRule, str], list[Any]] = {}
        for name, to in edit.changes.items():
            row = rows[name]
            rule = LayerRule() if to is None else _rule_at(edit, row, to)
            # One rule for the layers of one module: linears that read one tensor then go on sharing their transform.
            wanted.setdefault((replace(rule, roles=(), match="*"), name.rpartition(".")[0]), []).append(row)
        every = list(self._plan(edit, edit.base).layers)
        rules = [one for (rule, parent), members in wanted.items() for one in _covering(rule, parent, members, every)]
        skipped = sum(to is None for to in edit.changes.values())
        counts = ((len(edit.changes) - skipped, "with other bits"), (skipped, "in full precision"))
        told = " and ".join(f"{count} layer{'s' * (count != 1)} {what}" for count, what in counts if count)
        said = f"{edit.base.name}, {told}."
        return replace(edit.base, rules=(*rules, *edit.base.rules), name=f"{edit.base.name}-edited", description=said)

    def _base_rows(self, edit: Edit) -> list[Any]:
        """The layers that a rule quantizes, also where a rule before it skips them."""
        return [row for row in self._plan(edit, edit.base).layers if _first_rule(edit.base.rules, row) is not None]

    def _plan(self, edit: Edit, recipe: Recipe) -> Any:
        return self.plans.plan_of(edit.model, recipe, edit.steps)


def bits_from(weight: Any, activation: Any) -> Bits:
    """The bits that two controls hold; RecipeError for others than the core allows."""
    found = Bits(whole("weight bits", weight, 1, 16), whole("activation bits", activation, 1, 16))
    _check_bits(found)
    return found


def _check_bits(bits: Bits) -> None:
    for label, value, allowed in (
        ("weight", bits.weight, WEIGHT_BITS), ("activation", bits.activation, ACTIVATION_BITS),
    ):  # fmt: skip
        if value not in allowed:
            raise RecipeError(f"{label} bits: got {value}; allowed are {', '.join(map(str, allowed))}.")


def _tidied(edit: Edit, rows: list[Any]) -> Edit:
    """Without the changes that change nothing."""
    base = {row.layer: _bits_of(row) for row in rows}
    return replace(edit, changes={name: to for name, to in edit.changes.items() if base[name] != to})


def _matches(rule: LayerRule, row: Any) -> bool:
    """Whether a rule is for a layer, as the core takes it."""
    return (not rule.roles or row.role in rule.roles) and fnmatch.fnmatch(row.layer, rule.match)


def _first_rule(rules: tuple[LayerRule, ...], row: Any) -> LayerRule | None:
    """The first rule for a layer that quantizes it."""
    return next((rule for rule in rules if rule.weight is not None and _matches(rule, row)), None)


def _rule_at(edit: Edit, row: Any, bits: Bits) -> LayerRule:
    """What the recipe's method does with a layer at these bits; a recipe of no method keeps its rule with other bits."""
    rules = METHODS[edit.method].build(bits.weight, bits.activation).rules if edit.method else ()
    rule = _first_rule(rules, row)
    if rule is not None:
        return rule
    rule = _first_rule(edit.base.rules, row)
    assert rule is not None and rule.weight is not None  # only layers that have one can be picked
    activation = replace(rule.activation, bits=bits.activation) if rule.activation is not None else None
    return replace(rule, weight=replace(rule.weight, bits=bits.weight), activation=activation)


def _bits_of(row: Any) -> Change:
    return Bits(row.weight_bits, row.activation_bits) if row.action == "quantize" else None


def _covering(rule: LayerRule, parent: str, members: list[Any], every: list[Any]) -> list[LayerRule]:
    """`rule` for exactly these layers: one by their module and roles where that is exact, else one each."""
    roles = tuple(dict.fromkeys(row.role for row in members))
    one = replace(rule, roles=roles, match=f"{glob.escape(parent)}.*")
    if {row.layer for row in every if _matches(one, row)} == {row.layer for row in members}:
        return [one]
    return [replace(rule, match=glob.escape(row.layer)) for row in members]


def _edited(row: Any, edit: Edit, errors: Errors) -> EditedLayer:
    bits = _bits_of(row)
    error = 0.0 if bits is None else errors.get(row.layer, {}).get(bits.label)
    return EditedLayer(
        row.layer, row.role, bits, row.transforms, row.kernel, bool(row.simulated), int(row.fp_bytes), int(row.weight_bytes),
        error, row.layer in edit.changes,
    )  # fmt: skip


def _short(name: str) -> str:
    return name.replace("transformer_blocks.", "blocks.")
