"""Recipes beside the tools a person could pick instead: one interleaved run for each model, through the profile command.

    pip install -e .[peers]
    python -m benchmarks.peers --add                                # the DiT and four layers of PixArt-XL, into results.csv
    python -m benchmarks.peers --models random-dit --rounds 30
    python -m trdq_core compare --recipes fp,rtn-w8a8,tr-dq-w8a8,peer-torchao-int8,... --prompts 32     # quality

Weights are random, so these models show times and bytes alone. Every tool gets the shapes, inputs and threads that recipes
get, and quantizes the linears that they quantize; with "-all" behind its name every linear, as it would by itself. A tool
that is not installed, or fails, is a row with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.tables import add_rows, rows_from_report
from trdq_core import runs
from trdq_core.presets import PEERS, parse_recipe
from trdq_core.presets.peers import EVERY_LINEAR, PREFIX
from trdq_core.specs import Recipe, RunSpec
from trdq_core.terminal import ProgressBar, report_text

MODELS = ("random-dit", "random-pixart-xl")
RECIPES = ("fp", "rtn-w8a8", "tr-dq-w8a8", "tr-dq-w4a8")
# Random weights have no outliers, so most transforms harm them and are left out. Trained ones need them: these keep all.
ROTATED = "-every-rotation"
HADAMARD = ("tr-dq-plus-w8a8",)  # permutation and Hadamard instead of dense rotations; rotated only
# With four time groups, switched: a step between swaps; benchmarks.switching has the swaps.
GROUPED, GROUPS = "-4-groups", 4
# As the tool does it when nobody says otherwise; of the tool that is the mark to reach, and of the one most like a recipe.
WHOLE = ("openvino-int8", "torchao-int8-compile")
CALIBRATION = ("red apple",)  # what random weights are calibrated on has no bearing on their speed


def recipe_names() -> list[str]:
    """Everything that is measured: recipes, ours with several time groups and rotated throughout, then every tool, then two
    of them on every linear.
    """
    ours = [f"{name}{end}" for name in RECIPES if name.startswith("tr-dq-w") for end in (GROUPED, ROTATED)]
    ours += [f"{name}{ROTATED}" for name in HADAMARD]
    return [
        *RECIPES,
        *ours,
        *(f"{PREFIX}{name}" for name in PEERS),
        *(f"{PREFIX}{name}{EVERY_LINEAR}" for name in WHOLE),
    ]


def recipe_called(name: str) -> Recipe:
    """The recipe of a name; ROTATED behind it keeps every transform, GROUPED gives it time groups in switched storage."""
    if name.endswith(GROUPED):
        return dataclasses.replace(parse_recipe(name.removesuffix(GROUPED), groups=GROUPS), name=name)
    if name.endswith(ROTATED):
        recipe = parse_recipe(name.removesuffix(ROTATED))
        # GPTQ takes minutes at PixArt's width, and what a weight is rounded to has no bearing on its speed.
        rules = tuple(dataclasses.replace(rule, rounding="nearest") for rule in recipe.rules)
        return dataclasses.replace(recipe, name=name, rules=rules, do_no_harm=False)
    return parse_recipe(name)


def specification(model: str, names: list[str], *, rounds: int, steps: int) -> RunSpec:
    """The profile run of one model."""
    return RunSpec(
        command="profile",
        model=model,
        recipes=tuple(recipe_called(name) for name in names),
        prompts=CALIBRATION,
        calibration_prompts=CALIBRATION,
        steps=steps,
        timing_rounds=rounds,
    )


def measure(spec: RunSpec, folder: Path) -> dict[str, Any]:
    """The report of one run, printed too."""
    with ProgressBar() as bar:
        report = runs.run(spec, folder, on_event=bar)
    print(report_text(report))
    return report


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--recipes", default=",".join(recipe_names()), metavar="A,B")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="sampler steps of the calibration and of the memory run")
    parser.add_argument("--add", action="store_true", help="take the figures into benchmarks/results.csv")
    options = parser.parse_args()
    for model in options.models:
        spec = specification(model, options.recipes.split(","), rounds=options.rounds, steps=options.steps)
        with tempfile.TemporaryDirectory() as folder:
            report = measure(spec, Path(folder))
        if options.add:
            add_rows(rows_from_report(report, tag="peers"))


if __name__ == "__main__":
    main()
