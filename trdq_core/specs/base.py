"""What all specifications have in common: frozen dataclasses that turn into JSON and back, unknown keys refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from trdq_core.errors import RecipeError

FORMAT_VERSION = 2  # 2: low rank, rounding, reconstruction, attention products, further grids
TIME_SPAN = 1000.0  # every model's time axis is mapped onto [0, 1000]

_Spec = TypeVar("_Spec", bound="Spec")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of all specifications: dictionaries and JSON both ways."""

    def to_dict(self) -> dict[str, Any]:
        """The specification as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """The specification as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls: type[_Spec], data: Mapping[str, Any]) -> _Spec:
        """The specification in `data`; RecipeError names every key that is not a field, and any value of a wrong type."""
        if not isinstance(data, Mapping):
            raise RecipeError(f"{cls.__name__}: expected a JSON object, got {type(data).__name__}.")
        hints = _hints(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise RecipeError(
                f"{cls.__name__}: unknown key {', '.join(map(repr, unknown))}; allowed keys are {', '.join(hints)}."
            )
        try:
            return cls(**{name: _decode(hints[name], value, f"{cls.__name__}.{name}") for name, value in data.items()})
        except TypeError as error:
            raise RecipeError(f"{cls.__name__}: a required key is missing ({error}).") from error

    @classmethod
    def from_json(cls: type[_Spec], text: str) -> _Spec:
        """The specification in JSON text; RecipeError if it is not JSON."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise RecipeError(f"{cls.__name__}: not JSON ({error.msg} at line {error.lineno}).") from error


@functools.cache  # tables of thousands of entries are read, and resolving annotations is slow
def _hints(cls: type[Spec]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; lists become tuples, objects become specifications."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where}: expected a list, got {value!r}.")
        return tuple(_decode(arguments[0], item, where) for item in value)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where}: got {value!r}; allowed are {', '.join(map(repr, arguments))}.")
        return value
    if isinstance(hint, type) and issubclass(hint, Spec):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise RecipeError(f"{where}: expected {hint.__name__}, got {value!r}.")
    return value
