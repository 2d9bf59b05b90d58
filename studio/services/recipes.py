"""Recipes that a visitor saved under a name: JSON files in the data folder, as `--recipe-file` takes them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studio.services.core import Core
from trdq_core.bitwidths import split_name
from trdq_core.errors import RecipeError, StorageError, TRDQError
from trdq_core.presets import ALIASES, METHODS
from trdq_core.specs import Recipe

log = logging.getLogger(__name__)
FOLDER = "recipes"
LONGEST_NAME = 40
_ALLOWED = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class SavedRecipes:
    """The saved recipes; found by their names, never by a path from the page."""

    core: Core

    def all(self) -> tuple[Recipe, ...]:
        """Every saved recipe that can be read, by name."""
        found = []
        for file in sorted(self._folder().glob("*.json")):
            try:
                found.append(replace(Recipe.from_json(file.read_text(encoding="utf-8")), name=file.stem))
            except (OSError, UnicodeDecodeError, TRDQError) as error:
                log.warning("The saved recipe %s is left out: %s", file.name, error)
        return tuple(found)

    def names(self) -> list[str]:
        """The names of the saved recipes."""
        return [recipe.name for recipe in self.all()]

    def files(self) -> dict[str, Path]:
        """Where each saved recipe is kept, by name."""
        return {name: self._folder() / f"{name}.json" for name in self.names()}

    def open(self, name: Any) -> Recipe:
        """The saved recipe of this name; RecipeError if there is none that can be read."""
        found = next((recipe for recipe in self.all() if recipe.name == name), None)
        if found is None:
            raise RecipeError(
                f"saved recipe: there is none called {str(name)[:40]!r} that can be read; choose another."
            )
        return found

    def save(self, name: Any, recipe: Recipe) -> Path:
        """Keep `recipe` under `name` and return its file, which any earlier one of that name gives way to."""
        called = check_name(name)
        file = self._folder() / f"{called}.json"
        partial = file.with_suffix(".tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(replace(recipe, name=called).to_json(), encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            raise StorageError(
                f"recipe {called}: it could not be saved ({error.strerror}); free some disk space."
            ) from error
        return file

    def _folder(self) -> Path:
        return Path(self.core.runs.data_folder()) / FOLDER


def check_name(name: Any) -> str:
    """`name` without blanks around it, if a recipe may be called so; RecipeError says what is wrong with it."""
    text = str(name or "").strip()
    if not text:
        raise RecipeError("recipe name: it is empty; write one such as my-plan.")
    if len(text) > LONGEST_NAME:
        raise RecipeError(f"recipe name: got {len(text)} characters; allowed are at most {LONGEST_NAME}.")
    if not _ALLOWED.fullmatch(text):
        raise RecipeError(f"recipe name: got {text!r}; use small letters, digits and dashes, such as my-plan.")
    method, bits = split_name(text)
    if text in (*METHODS, *ALIASES) or (bits is not None and method in (*METHODS, *ALIASES)) or text == "fp-again":
        raise RecipeError(f"recipe name: {text} is a method's own; choose another, such as my-{text}.")
    return text
