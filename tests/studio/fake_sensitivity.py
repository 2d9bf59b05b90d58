"""Sensitivity scans and budgets without a model: made-up errors that fall with the bits, and a budget spent from the front."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trdq_core.errors import RecipeError
from trdq_core.sensitivity.table import FILE, Cell, LayerSensitivity, Sensitivity
from trdq_core.specs import RunSpec

WIDTH = 384


def cell_of(index: int, label: str) -> Cell:
    """Errors that fall by four with each bit of the weight; later layers matter less."""
    weight, activation = (int(part) for part in re.findall(r"\d+", label))
    error = (0.5 + 1 / (1 + index)) * (4.0**-weight + 0.2 * 4.0**-activation)
    size = WIDTH * WIDTH * (4 if weight <= 4 else 8) // 8 + 1536
    return Cell(3 * error, error, size, size)


def write_scan(folder: Path, spec: RunSpec, layers: list[tuple[str, str]], bits: tuple[str, ...]) -> None:
    """The sensitivity.json of a scan that got as far as `bits`; `layers` are names and roles."""
    rows = tuple(
        LayerSensitivity(name, role, name, WIDTH, WIDTH, {label: cell_of(index, label) for label in bits})
        for index, (name, role) in enumerate(layers)
    )
    about = {
        "model": spec.model, "method": spec.recipes[0].name.rpartition("-w")[0], "prompts": list(spec.prompts),
        "timesteps": [900.0, 650.0, 400.0, 150.0], "steps": spec.steps, "guidance": spec.guidance, "seed": spec.seed,
        "complete": bits == spec.bits, "seconds": 3.0,
    }  # fmt: skip
    recipes = {label: recipe for label, recipe in zip(spec.bits, spec.recipes, strict=True) if label in bits}
    Sensitivity(bits, rows, recipes, about).save(folder / FILE)


class FakeBudget:
    """`trdq_core.budget`: the first layers get the most bits that the budget still allows."""

    def parse_bytes(self, text: str, table: Sensitivity) -> int:
        if not re.fullmatch(r"\d+(\.\d+)?", text):
            raise RecipeError(f"--bytes: got {text!r}; write bytes, 3.2MB, 3MiB, or a share of FP32 such as 0.2.")
        value = float(text)
        return int(value * 4 * WIDTH * WIDTH * len(table.layers)) if value <= 1 else int(value)

    def allocate(self, table: Sensitivity, budget: int) -> Any:
        least = min(table.bits, key=lambda label: table.layers[0].cells[label].bytes)
        most = max(table.bits, key=lambda label: table.layers[0].cells[label].bytes)
        small, large = (table.layers[0].cells[label].bytes for label in (least, most))
        count = len(table.layers)
        if budget < count * small:
            raise RecipeError(
                f"--bytes: got {budget:,}; the smallest choice takes {count * small:,} bytes, give at least that."
            )
        wide = min(count, (budget - count * small) // max(1, large - small))
        rules = [
            replace(rule, match=layer.layer, roles=())
            for index, layer in enumerate(table.layers)
            for rule in table.recipes[most if index < wide else least].rules[:1]
        ]
        recipe = replace(table.recipes[most], rules=tuple(rules), name=f"{table.about['method']}-{budget}-bytes")
        return SimpleNamespace(recipe=recipe, budget=budget, bytes=wide * large + (count - wide) * small)
