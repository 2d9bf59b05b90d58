"""Our recipe with one piece taken away, changed or added at a time, evaluated like any recipe: which piece earns its place.

    python -m benchmarks.ablation_recipe --bits W4A8,W4A4 --prompts 16 --out runs/ablation
    python -m benchmarks.tables --add runs/ablation/evaluation.json --tag ablation

The base has one set for all timesteps, so that each row differs from it by one thing; time groups are rows of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from trdq_core import runs
from trdq_core.arguments import spec_from
from trdq_core.bitwidths import parse_bits
from trdq_core.presets import make_recipe
from trdq_core.specs import LayerRule, LowRankSpec, QuantSpec, Recipe, ReconstructionSpec, TransformSpec
from trdq_core.terminal import ProgressBar

METHOD = "tr-dq-plus"
LOW_RANK = "tr-dq-plus-low-rank"
Change = Callable[[LayerRule], LayerRule]


def without(kind: str) -> Change:
    """The rule without one kind of transform."""
    return lambda rule: dataclasses.replace(
        rule, transforms=tuple(spec for spec in rule.transforms if spec.kind != kind)
    )


def transforms(change: Callable[[TransformSpec], TransformSpec]) -> Change:
    """The rule with every transform changed."""
    return lambda rule: dataclasses.replace(rule, transforms=tuple(change(spec) for spec in rule.transforms))


def greedy(rule: LayerRule) -> LayerRule:
    """Two greedy rotations around the permutation in place of the Hadamard."""
    rotation = TransformSpec(kind="greedy_rotation")
    kept = tuple(spec for spec in rule.transforms if spec.kind == "smooth")
    return dataclasses.replace(rule, transforms=(*kept, rotation, TransformSpec(kind="serpentine"), rotation))


def grid(name: str, **changes: object) -> Change:
    """The rule with another grid of its weight or activation."""
    return lambda rule: dataclasses.replace(rule, **{name: dataclasses.replace(getattr(rule, name), **changes)})


def smoothing(**changes: object) -> Change:
    """The rule with another smoothing."""
    return transforms(lambda spec: dataclasses.replace(spec, **changes) if spec.kind == "smooth" else spec)


CHANGES: dict[str, Change] = {
    "no-gptq": lambda rule: dataclasses.replace(rule, rounding="nearest"),
    "no-weight-clip": grid("weight", range="minmax"),
    "no-input-clip": grid("activation", range="minmax"),
    "no-smoothing": without("smooth"),
    "alpha-0.5": smoothing(alpha=0.5),
    "absmax-max": smoothing(absmax="max"),
    "no-serpentine": without("serpentine"),
    "no-hadamard": without("hadamard"),
    "hadamard-alone": lambda rule: without("smooth")(without("serpentine")(rule)),
    "no-signs": transforms(lambda spec: dataclasses.replace(spec, random_signs=False)),
    "greedy": greedy,
    "low-rank-32": lambda rule: dataclasses.replace(rule, low_rank=LowRankSpec(rank=32)),
    "groups-64": lambda rule: dataclasses.replace(
        rule, weight=QuantSpec(bits=rule.weight.bits, granularity="group", group_size=64, range="mse")
    ),
}


def variants(weight_bits: int, activation_bits: int) -> list[Recipe]:
    """The base, every change to it, learnt rounding in place of GPTQ, and the base in time groups."""
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    label = f"w{weight_bits}a{activation_bits}"
    base = make_recipe(METHOD, **bits)
    found = [dataclasses.replace(base, name=f"plus-base-{label}")]
    for name, change in CHANGES.items():
        rules = tuple(change(rule) for rule in base.rules)
        if rules != base.rules:
            found.append(dataclasses.replace(base, name=f"{name}-{label}", rules=rules))
    learned = tuple(dataclasses.replace(rule, rounding="adaround") for rule in base.rules)
    found.append(
        dataclasses.replace(base, name=f"learnt-rounding-{label}", rules=learned, reconstruction=ReconstructionSpec())
    )
    found.append(dataclasses.replace(base, name=f"no-do-no-harm-{label}", do_no_harm=False))
    for kind in ("uniform", "dp"):
        grouped = make_recipe(METHOD, **bits, groups=4, group_kind=kind)
        found.append(dataclasses.replace(grouped, name=f"{kind}-groups-4-{label}"))
        if kind == "uniform":  # whether it is the scales of each group that pay, or its rounding
            rules = tuple(without("smooth")(rule) for rule in grouped.rules)
            found.append(dataclasses.replace(grouped, name=f"{kind}-groups-4-no-smoothing-{label}", rules=rules))
    return [*found, *low_rank_variants(bits, label)]


def low_rank_variants(bits: dict[str, int], label: str) -> list[Recipe]:
    """The recipe with a branch: as it is, without the refit, and in time groups."""
    base = make_recipe(LOW_RANK, **bits)
    (rule,) = base.rules
    assert rule.low_rank is not None  # what the recipe is named for
    plain = dataclasses.replace(rule, low_rank=dataclasses.replace(rule.low_rank, refit=False))
    return [
        dataclasses.replace(base, name=f"branch-{label}"),
        dataclasses.replace(base, name=f"branch-no-refit-{label}", rules=(plain,)),
        dataclasses.replace(make_recipe(LOW_RANK, **bits, groups=4), name=f"branch-uniform-groups-4-{label}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-image", help="model to evaluate on (default: pocket-image)")
    parser.add_argument("--bits", default="W4A8,W4A4", help="bit-widths (default: W4A8,W4A4)")
    parser.add_argument("--prompts", type=int, default=16, help="evaluation prompts (default: 16)")
    parser.add_argument("--leave-out", default="", help="variants not to run, by name without bits, commas between")
    parser.add_argument("--only", default="", help="run these variants alone")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    given = parser.parse_args()
    left_out = set(given.leave_out.split(","))
    recipes = [
        recipe
        for label in parse_bits(given.bits)
        for recipe in variants(*(int(width) for width in label.lower()[1:].split("a")))
        if recipe.name.rpartition("-")[0] not in left_out
        and (not given.only or recipe.name.rpartition("-")[0] in given.only.split(","))
    ]
    given_flags = {"command": "evaluate", "model": given.model, "recipes": "fp", "prompts": given.prompts}
    spec = dataclasses.replace(spec_from(given_flags), recipes=tuple(recipes))
    with ProgressBar() as bar:
        runs.run(spec, given.out, on_event=bar)
    print(f"evaluated {len(recipes)} recipes; everything is in {given.out}")


if __name__ == "__main__":
    main()
