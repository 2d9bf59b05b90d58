"""What the controls say, checked and turned into the run that the command line takes."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from studio.services import peers, prompts
from studio.services.methods import SAVED_PREFIX, saved_name, title_of_method
from trdq_core.bitwidths import split_name
from trdq_core.errors import RecipeError
from trdq_core.presets import METHODS, PEERS, make_recipe, missing, with_sharing
from trdq_core.presets.peers import PREFIX
from trdq_core.specs import (
    ACTIVATION_BITS,
    STORAGE_MODES,
    TIME_GROUP_KINDS,
    TIME_SPAN,
    WEIGHT_BITS,
    Command,
    Recipe,
    RunSpec,
    SharingSpec,
    Storage,
    check_prompt,
)

DEFAULT_MODEL = "pocket-image"
GROUP_KIND_CHOICES = [("Uniform", "uniform"), ("Edges", "edges"), ("Fitted", "dp"), ("Per step", "per_step")]
STORAGE_CHOICES = [(mode.capitalize(), mode) for mode in STORAGE_MODES]
BITS_CHOICES = sorted(WEIGHT_BITS)
ACTIVATION_BITS_CHOICES = sorted(ACTIVATION_BITS)
STORAGE_LINES: dict[Storage, str] = {
    "shared": "One transform fitted on all groups. Cheapest; an approximation of the method.",
    "resident": "Every group keeps its own weights on the device. Exact; costs memory for each group.",
    "switched": "Every group keeps its own weights on disk, one set at a time on the device. Exact; costs a swap at each edge.",
}
MOST_EXTRA_PROMPTS = 32


class AppliedPlan(NamedTuple):
    """A sharing plan that a visitor applied on the Guidance page, and the model it was made for."""

    model: str
    plan: SharingSpec


@dataclass(frozen=True, kw_only=True)
class Form:
    """The controls' values as they came from the page, in the order of the controls; nothing is trusted yet."""

    model: Any = DEFAULT_MODEL
    method: Any = "tr-dq"
    baseline: Any = "rtn"
    weight_bits: Any = 4
    activation_bits: Any = 8
    group_kind: Any = "uniform"
    groups: Any = 4
    edges: Any = ""
    storage: Any = "switched"
    steps: Any = 20
    guidance: Any = 3.5
    seed: Any = 0
    prompt: Any = ""
    extra_prompts: Any = 0
    share: Any = False
    applied: Any = None  # an AppliedPlan, kept on the server
    saved: Any = ()  # the saved recipes, kept on the server

    @classmethod
    def names(cls) -> list[str]:
        """The controls in order."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def of(cls, *values: Any) -> Form:
        """The form of the controls' values in order."""
        return cls(**dict(zip(cls.names(), values, strict=True)))


def chosen_recipe(form: Form) -> Recipe:
    """The recipe of the chosen method."""
    return _recipe(form, str(form.method))


def baseline_recipe(form: Form) -> Recipe:
    """The recipe of the baseline at the same bits; RecipeError if it is the chosen method itself."""
    if form.baseline == form.method:
        title = saved_name(form.method) or title_of_method(str(form.method))
        raise RecipeError(f"baseline: {title} is also the chosen method; choose another baseline to compare it with.")
    return _baseline(form)


def compare_spec(form: Form) -> RunSpec:
    """The comparison that the form asks for: FP, the baseline, the chosen method; each also with sharing if it is ticked."""
    prompt = check_prompt(str(form.prompt or ""))
    extra = whole("also measure on", form.extra_prompts, 0, MOST_EXTRA_PROMPTS)
    return run_spec(form, "compare", _compared(form), (prompt, *prompts.evaluation(str(form.model), extra, prompt)))


def plain_comparison(form: Form, recipe: Recipe) -> RunSpec:
    """Full precision, the baseline and a recipe with the form's settings, on the command's own prompts."""
    first = tuple(baseline for baseline in (_baseline(form),) if baseline.name != recipe.name)
    return run_spec(form, "compare", (make_recipe("fp"), *first, recipe), ())


def profile_spec(form: Form) -> RunSpec:
    """The timing that stands in for a comparison where a model has random weights and its pictures say nothing."""
    return run_spec(form, "profile", _compared(form), (check_prompt(str(form.prompt or "")),))


def calibrate_spec(form: Form) -> RunSpec:
    """The calibration for the chosen method."""
    return run_spec(form, "calibrate", (chosen_recipe(form),), ())


def parse_edges(text: Any) -> tuple[float, ...]:
    """The numbers in "250, 500 750"; RecipeError names the first that is none."""
    edges = []
    for word in str(text or "").replace(",", " ").split():
        try:
            edge = float(word)
        except ValueError:
            edge = math.nan
        if not math.isfinite(edge):
            raise RecipeError(f"edges: got {word[:40]!r}; give timesteps such as 250, 500, 750.")
        edges.append(edge)
    return tuple(edges)


def random_seed() -> int:
    """A seed nobody chose."""
    return secrets.randbelow(100_000)


def group_span(kind: Any, groups: Any) -> str:
    """One line that says what the chosen groups are."""
    if kind == "per_step":
        return "One group around each timestep that the calibration saw: the most exact, and the largest."
    if kind == "edges":
        return f"Groups between these timesteps of 0 to {TIME_SPAN:.0f}; k edges make k + 1 groups."
    if kind == "dp":
        return "Groups of timesteps whose channel ranges are alike, cut where the calibration says so (dynamic programming)."
    return "Equal spans of the model's timesteps, each with its own transform."


def form_of_spec(spec: RunSpec, saved: Collection[Recipe] = ()) -> dict[str, Any]:
    """The controls' values that would make this run again, as far as the controls and the `saved` recipes can say it."""
    values: dict[str, Any] = {
        "model": spec.model, "steps": spec.steps, "guidance": spec.guidance, "seed": spec.seed,
    }  # fmt: skip
    if spec.prompts:
        values |= {"prompt": spec.prompts[0], "extra_prompts": len(spec.prompts) - 1}
    plan = next((recipe.sharing for recipe in spec.recipes if recipe.sharing), None)
    values |= {"share": plan is not None, "applied": AppliedPlan(spec.model, plan) if plan else None}
    other = next((recipe.name for recipe in spec.recipes if recipe.peer in PEERS), None)
    quantized = [recipe for recipe in spec.recipes if recipe.fitted]
    quantized = [recipe for recipe in quantized if recipe.sharing is None] or quantized
    if not quantized:
        return values
    chosen, kept = quantized[-1], {recipe.name for recipe in saved}
    method = _method_of(chosen.name, kept)
    if method is not None:
        values["method"] = method
    if len(quantized) > 1 and (baseline := _method_of(quantized[0].name, kept)) is not None:
        values |= {} if baseline == method else {"baseline": baseline}
    elif other is not None and missing(PEERS[other.removeprefix(PREFIX)]) is None:
        values["baseline"] = other
    named = [recipe for recipe in reversed(quantized) if split_name(recipe.name)[0] in METHODS]
    for rule in (recipe.rules[0] for recipe in named[:1]):
        if rule.weight and rule.activation:
            values |= {"weight_bits": rule.weight.bits, "activation_bits": rule.activation.bits}
    grouped = next((recipe for recipe in named if METHODS[split_name(recipe.name)[0]].time_grouped), None)
    return values | (_times(grouped) if grouped else {})


def _method_of(recipe: str, saved: Collection[str]) -> str | None:
    """What a dropdown calls the method of a recipe: its own name, or a saved recipe; nothing for any other."""
    method, bits = split_name(recipe)
    if bits is not None and method in METHODS:
        return method
    return SAVED_PREFIX + recipe if recipe in saved else None


def _times(recipe: Recipe) -> dict[str, Any]:
    """The controls' values for a recipe's time groups."""
    edges = ", ".join(f"{edge:g}" for edge in recipe.time.edges)
    return {"group_kind": recipe.time.kind, "groups": recipe.time.count, "storage": recipe.storage, "edges": edges}


def shared(form: Form, recipes: tuple[Recipe, ...], applied: AppliedPlan) -> tuple[Recipe, ...]:
    """Each recipe and, beside it, the same with the applied plan, other tools alone; RecipeError where the plan cannot work."""
    if applied.model != form.model:
        raise RecipeError(
            f"attention sharing: the plan was made for {applied.model} and the model is {form.model}; "
            "apply a plan of this model on the Guidance page, or switch sharing off."
        )
    if form.guidance == 1:
        raise RecipeError(
            "guidance: got 1, which has one branch and nothing to share; give more, or switch sharing off."
        )
    return tuple(
        both
        for recipe in recipes
        for both in ((recipe,) if recipe.peer else (recipe, with_sharing(recipe, applied.plan)))
    )


def _compared(form: Form) -> tuple[Recipe, ...]:
    recipes = (make_recipe("fp"), baseline_recipe(form), chosen_recipe(form))
    if not form.share:
        return recipes
    if not isinstance(form.applied, AppliedPlan):
        raise RecipeError("attention sharing: there is no plan yet; make and apply one on the Guidance page.")
    return shared(form, recipes, form.applied)


def _baseline(form: Form) -> Recipe:
    """The recipe of the baseline, which may be another tool."""
    name = str(form.baseline)
    return peers.recipe_of(name) if peers.is_peer(name) else _recipe(form, name)


def _recipe(form: Form, method: str) -> Recipe:
    name = saved_name(method)
    if name is not None:
        return _saved_recipe(form, name)
    return make_recipe(
        method,
        weight_bits=whole("weight bits", form.weight_bits, 1, 16),
        activation_bits=whole("activation bits", form.activation_bits, 1, 16),
        **grouping(form),
    )


def grouping(form: Form) -> dict[str, Any]:
    """The form's time groups as the core's recipes take them; methods that ignore time, or bring their own, ignore them."""
    kind = form.group_kind
    if kind not in TIME_GROUP_KINDS:
        raise RecipeError(f"groups: got the kind {kind!r}; allowed are {', '.join(TIME_GROUP_KINDS)}.")
    if form.storage not in STORAGE_MODES:
        raise RecipeError(f"storage: got {form.storage!r}; allowed are {', '.join(STORAGE_MODES)}.")
    edges = parse_edges(form.edges) if kind == "edges" else ()
    groups = len(edges) + 1 if kind == "edges" else 1
    if kind in ("uniform", "dp"):
        groups = whole("groups", form.groups, 1, 1000)
    return {"groups": groups, "group_kind": kind, "edges": edges, "storage": form.storage}


def _saved_recipe(form: Form, name: str) -> Recipe:
    found = next((recipe for recipe in form.saved or () if recipe.name == name), None)
    if found is None:
        raise RecipeError(f"method: there is no saved recipe called {name[:40]!r} any more; choose another method.")
    return found


def run_spec(form: Form, command: Command, recipes: tuple[Recipe, ...], texts: tuple[str, ...]) -> RunSpec:
    """A run with the form's model, steps, guidance and seed, calibrated as the command line would."""
    return RunSpec(
        command=command,
        model=str(form.model or ""),
        recipes=recipes,
        prompts=texts,
        calibration_prompts=prompts.calibration(str(form.model)),
        steps=whole("steps", form.steps, -1_000_000, 1_000_000),
        guidance=number("guidance", form.guidance),
        seed=whole("seed", form.seed, -(2**40), 2**40),
    )


def number(label: str, value: Any) -> float:
    """`value` as a finite number; RecipeError names the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(f"{label}: it is empty or not a number; write one.")
    return float(value)


def whole(label: str, value: Any, least: int, most: int) -> int:
    """`value` as a whole number from `least` to `most`; RecipeError names the field."""
    given = number(label, value)
    if given != int(given) or not least <= given <= most:
        raise RecipeError(f"{label}: got {given:g}; give a whole number from {least} to {most}.")
    return int(given)
