"""The sensitivity table: what is measured of each layer at each bit-width, saved as JSON and CSV. No torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trdq_core.errors import CalibrationError, StorageError
from trdq_core.specs import Recipe

FORMAT_VERSION = 1
FILE = "sensitivity.json"
CSV_COLUMNS = (
    "layer", "role", "group", "in_features", "out_features", "bits", "layer_error", "denoiser_error", "bytes", "packed_bytes",
)  # fmt: skip

ROLE_COLUMNS = ("role", "layers", "bits", "layer_error", "denoiser_error", "bytes", "packed_bytes")


class Cell(NamedTuple):
    """One layer at one bit-width, all other layers in full precision. Errors are squared error over squared output."""

    layer_error: float  # of the layer's own output, on calibration rows
    denoiser_error: float  # of the denoiser's output, on recorded inputs
    bytes: int  # as it lies in memory: codes, scales, and for the first of an input group its transform
    packed_bytes: int  # the same with every code packed to its own bits, as a file holds it


class LayerSensitivity(NamedTuple):
    """One quantizable linear. Layers of one `group`, named after its first, read one tensor and share its transform."""

    layer: str
    role: str
    group: str
    in_features: int
    out_features: int
    cells: Mapping[str, Cell]  # by bit label


class RoleSensitivity(NamedTuple):
    """The quantizable linears of one role together: errors and bytes are sums over its layers, each quantized alone."""

    role: str
    layers: int
    cells: Mapping[str, Cell]  # by bit label


@dataclass(frozen=True)
class Sensitivity:
    """All quantizable linears at all measured bit-widths, and the recipe each bit-width was measured with."""

    bits: tuple[str, ...]
    layers: tuple[LayerSensitivity, ...]  # in model order
    recipes: Mapping[str, Recipe]  # by bit label
    about: Mapping[str, Any]  # model, method, prompts, timesteps, steps, guidance, seed, fingerprint, seconds

    def groups(self) -> dict[str, tuple[LayerSensitivity, ...]]:
        """The layers of each input group, in model order."""
        found: dict[str, list[LayerSensitivity]] = {}
        for layer in self.layers:
            found.setdefault(layer.group, []).append(layer)
        return {name: tuple(members) for name, members in found.items()}

    def roles(self) -> dict[str, RoleSensitivity]:
        """What the layers of each role add up to, in the order in which the model has the roles."""
        members: dict[str, list[LayerSensitivity]] = {}
        for layer in self.layers:
            members.setdefault(layer.role, []).append(layer)
        return {
            role: RoleSensitivity(
                role, len(layers), {bits: Cell(*map(sum, zip(*(x.cells[bits] for x in layers), strict=True)))
                for bits in self.bits},
            )
            for role, layers in members.items()
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "bits": list(self.bits),
            "layers": [
                {**layer._asdict(), "cells": {bits: cell._asdict() for bits, cell in layer.cells.items()}}
                for layer in self.layers
            ],
            "recipes": {bits: recipe.to_dict() for bits, recipe in self.recipes.items()},
            "about": dict(self.about),
        }

    def to_json(self) -> str:
        """JSON text; `load` reads it."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def csv_text(self) -> str:
        """One line for each layer and bit-width."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for layer in self.layers:
            for bits, cell in layer.cells.items():
                writer.writerow([*layer[:-1], bits, *cell])
        return text.getvalue()

    def roles_csv_text(self) -> str:
        """One line for each role and bit-width."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(ROLE_COLUMNS)
        for role in self.roles().values():
            for bits, cell in role.cells.items():
                writer.writerow([role.role, role.layers, bits, *cell])
        return text.getvalue()

    def save(self, file: Path) -> None:
        """Write the JSON file whole or not at all."""
        partial = file.with_suffix(".tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.to_json())
            partial.replace(file)
        except OSError as error:
            raise StorageError(
                f"{file.name}: could not be written ({error.strerror}); free some disk space."
            ) from error

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Read a sensitivity.json, or the one in a run folder; errors say what is wrong with it."""
        file = path / FILE if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(
                f"--sensitivity: {file} cannot be read ({error.strerror}); run the sensitivity command first."
            ) from error
        except ValueError as error:
            raise CalibrationError(f"{file.name}: damaged ({error}); run the sensitivity command again.") from error
        try:
            if data["format_version"] > FORMAT_VERSION:
                raise CalibrationError(
                    f"{file.name}: format {data['format_version']} is newer than {FORMAT_VERSION}, update TR-DQ Studio."
                )
            recipes = {bits: Recipe.from_dict(recipe) for bits, recipe in data["recipes"].items()}
            return cls(tuple(data["bits"]), _layers(data["layers"], data["bits"]), recipes, data["about"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"{file.name}: it is not a sensitivity table ({type(error).__name__} {error}); give the file of a "
                "sensitivity run."
            ) from error


def _layers(data: Sequence[Mapping[str, Any]], bits: Sequence[str]) -> tuple[LayerSensitivity, ...]:
    return tuple(
        LayerSensitivity(**{**one, "cells": {label: Cell(**one["cells"][label]) for label in bits}}) for one in data
    )
