"""What converting would do, known before anything runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from studio.services import models
from studio.services.core import Core
from studio.services.form import Form, calibrate_spec, chosen_recipe
from trdq_core.presets import METHODS
from trdq_core.specs import STORAGE_MODES, Recipe, RunSpec, Storage

MOST_REMEMBERED = 64


@dataclass(frozen=True)
class PlanView:
    """The plan of the chosen recipe, and the price of each storage mode as (mode, device bytes, disk bytes)."""

    recipe: Recipe
    plan: Any
    prices: tuple[tuple[Storage, int, int], ...]
    calibration: Any | None
    calibrations: tuple[Any, ...]
    spec: RunSpec


@dataclass
class Plans:
    """Plans by model and recipe; the newest are remembered."""

    core: Core
    _known: dict[tuple[str, Recipe, int], Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, form: Form) -> PlanView:
        """The plan for a form; TRDQError if the form cannot be run."""
        recipe, spec = chosen_recipe(form), calibrate_spec(form)
        models.check(self.core, spec.model)
        plan = self.plan_of(spec.model, recipe, spec.steps)
        stored = tuple(self.core.runs.list_calibrations(spec.model))
        fits = self.core.runs.find_calibration(spec)
        return PlanView(recipe, plan, self._prices(form, spec), fits, stored, spec)

    def _prices(self, form: Form, spec: RunSpec) -> tuple[tuple[Storage, int, int], ...]:
        method = METHODS.get(str(form.method))
        if method is None or not method.time_grouped:
            return ()
        prices = []
        for mode in STORAGE_MODES:
            recipe = chosen_recipe(Form(**{**vars(form), "storage": mode}))
            plan = self.plan_of(spec.model, recipe, spec.steps)
            prices.append((mode, int(plan.resident_bytes), int(plan.disk_bytes)))
        return tuple(prices)

    def plan_of(self, model: str, recipe: Recipe, steps: int) -> Any:
        """The core's plan of a recipe, computed once."""
        key = (model, recipe, steps if recipe.time.kind == "per_step" else 0)
        with self._lock:
            if key not in self._known:
                while len(self._known) >= MOST_REMEMBERED:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = self.core.runs.plan(model, recipe, steps=steps)
            return self._known[key]
