"""What can be asked for, as frozen data: recipes, their parts, and runs. JSON both ways; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from trdq_core.errors import RecipeError

FORMAT_VERSION = 1
TIME_SPAN = 1000.0  # every model's time axis is mapped onto [0, 1000]
WEIGHT_BITS = (4, 6, 8)
ACTIVATION_BITS = (4, 6, 8)

Granularity = Literal["tensor", "channel", "token", "group"]
TransformKind = Literal["smooth", "greedy_rotation", "serpentine", "hadamard"]
TimeGroupKind = Literal["uniform", "edges", "per_step"]
Storage = Literal["shared", "resident", "switched"]
Command = Literal["calibrate", "sample", "compare", "profile", "attention"]
SharingMeasure = Literal["map_cosine", "output_error"]

STORAGE_MODES: tuple[Storage, ...] = typing.get_args(Storage)
SHARING_MEASURES: tuple[SharingMeasure, ...] = typing.get_args(SharingMeasure)
TIME_GROUP_KINDS: tuple[TimeGroupKind, ...] = typing.get_args(TimeGroupKind)

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
        hints = typing.get_type_hints(cls)
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


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Spec):
    """One tensor's grid. Uniform; `range` "mse" searches the clipping ratio (1.0 included) for the least squared error."""

    bits: int
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    dynamic: bool = False
    range: Literal["minmax", "mse"] = "minmax"

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise RecipeError(f"bits: got {self.bits}; allowed are {', '.join(map(str, WEIGHT_BITS))}.")
        if (self.granularity == "group") != (self.group_size is not None):
            raise RecipeError(
                f'group_size: got {self.group_size} with granularity "{self.granularity}"; '
                'give a group_size exactly when granularity is "group".'
            )
        if self.granularity == "group" and not self.symmetric:
            raise RecipeError('symmetric: granularity "group" uses two-level integer scales and must be symmetric.')
        if self.dynamic and self.granularity not in ("token", "tensor"):
            raise RecipeError(f'dynamic: only "token" or "tensor" ranges are dynamic, not "{self.granularity}".')


@dataclass(frozen=True, kw_only=True)
class TransformSpec(Spec):
    """One step of the input transform. Every transform leaves the layer's output unchanged before quantization.

    smooth: x / d with d = a^alpha / w^(1-alpha), a the channel absmax of activations, w of weights.
    greedy_rotation: one dense n x n rotation for all blocks, fitted by greedy peak reduction (DuQuant, TR-DQ).
    serpentine: permutation dealing the channels to the blocks in order of size (DuQuant, TR-DQ).
    hadamard: normalised block Walsh-Hadamard.
    """

    kind: TransformKind
    alpha: float = 0.5
    absmax: Literal["max", "ema"] = "max"  # how the channel absmax of several calibration batches are merged
    momentum: float = 0.95
    block: int | None = None  # None: the largest that divides the width and costs little (see transforms.rotation)
    steps: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha: got {self.alpha}; allowed is 0 to 1.")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum: got {self.momentum}; allowed is 0 up to, not including, 1.")
        if self.block is not None and (self.block < 2 or self.block & (self.block - 1)):
            raise RecipeError(f"block: got {self.block}; allowed are powers of two from 2, or none for automatic.")
        if self.steps < 1:
            raise RecipeError(f"steps: got {self.steps}; allowed is 1 or more.")


@dataclass(frozen=True, kw_only=True)
class TimeGroupSpec(Spec):
    """How the time axis [0, 1000] is cut. "per_step" puts one group around each calibrated timestep."""

    kind: TimeGroupKind = "uniform"
    count: int = 1
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 1000:
            raise RecipeError(f"groups: got {self.count}; allowed is 1 to 1000.")
        if self.kind == "edges":
            ordered = all(a < b for a, b in itertools.pairwise(self.edges))
            if not self.edges or not ordered or not all(0 < edge < TIME_SPAN for edge in self.edges):
                raise RecipeError(
                    f"edges: got {list(self.edges)}; give rising timesteps between 0 and 1000, both ends left out."
                )

    def groups_in(self, steps: int) -> int:
        """How many groups a calibration of `steps` timesteps is cut into; `count` speaks for kind "uniform" only."""
        if self.kind == "per_step":
            return steps
        return len(self.edges) + 1 if self.kind == "edges" else self.count


@dataclass(frozen=True, kw_only=True)
class LayerRule(Spec):
    """What happens to linears of some roles; the first rule that matches a layer wins, no rule leaves it in full precision."""

    roles: tuple[str, ...] = ()  # empty: every role
    match: str = "*"  # shell pattern on the layer's name
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    transforms: tuple[TransformSpec, ...] = ()

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.activation is None):
            raise RecipeError(f'rule "{self.match}": weight and activation are quantized together, or neither is.')
        if self.activation is not None and (self.activation.granularity == "token") != self.activation.dynamic:
            raise RecipeError(
                f'rule "{self.match}": activations are dynamic per token or static per tensor, '
                f"got {'dynamic' if self.activation.dynamic else 'static'} per {self.activation.granularity}."
            )
        if self.activation is not None and self.activation.granularity not in ("token", "tensor"):
            raise RecipeError(
                f'rule "{self.match}": activations are quantized per token or per tensor, not per {self.activation.granularity}.'
            )
        kinds = [transform.kind for transform in self.transforms]
        allowed = ("smooth", "greedy_rotation", "serpentine", "hadamard", "greedy_rotation")
        position = 0
        for kind in kinds:
            if kind not in allowed[position:]:
                raise RecipeError(
                    f"transforms: got {' > '.join(kinds)}; the order is smooth > greedy_rotation > serpentine > "
                    "hadamard > greedy_rotation, each left out at will."
                )
            position = allowed.index(kind, position) + 1


@dataclass(frozen=True, kw_only=True)
class SharingSpec(Spec):
    """Blocks whose unconditional branch takes the self-attention map of the conditional one, for each group of timesteps.

    `blocks[g]` lists the blocks shared in group g, group 0 being the smallest timesteps; `edges` are the rising borders
    between the groups. With a measure and a threshold and no block it is a wish, which `similarity.plan_sharing` fulfils.
    Errors are relative output errors, the saving is a share of the attention FLOPs of a whole run; all measured before.
    """

    blocks: tuple[tuple[int, ...], ...] = ()
    edges: tuple[float, ...] = ()
    measure: SharingMeasure | None = None
    threshold: float | None = None
    predicted_error: float | None = None  # mean over the shared blocks and steps
    worst_error: float | None = None
    predicted_saving: float | None = None
    description: str = ""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if not rising or any(not 0 < edge < TIME_SPAN for edge in self.edges):
            raise RecipeError(
                f"sharing edges: got {list(self.edges)}; give rising timesteps between 0 and 1000, both ends left out."
            )
        if self.blocks and len(self.blocks) != len(self.edges) + 1:
            raise RecipeError(
                f"sharing blocks: got {len(self.blocks)} lists for {len(self.edges) + 1} time groups; give one list a group."
            )
        if any(block < 0 for group in self.blocks for block in group):
            raise RecipeError("sharing blocks: got a negative block number; blocks count from 0.")
        if (self.measure is None) != (self.threshold is None):
            raise RecipeError("sharing threshold: a measure and its threshold are given together, or neither is.")

    @property
    def active(self) -> bool:
        """Whether any block is shared at any time."""
        return any(self.blocks)


@dataclass(frozen=True, kw_only=True)
class Recipe(Spec):
    """A quantization method with its numbers. A method is data: adding one needs no class."""

    name: str
    rules: tuple[LayerRule, ...] = ()
    time: TimeGroupSpec = field(default_factory=TimeGroupSpec)
    storage: Storage = "shared"
    do_no_harm: bool = True
    sharing: SharingSpec | None = None
    description: str = ""
    source: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise RecipeError(
                f"format_version: got {self.format_version}; this version reads up to {FORMAT_VERSION}, update TR-DQ Studio."
            )

    @property
    def quantized(self) -> bool:
        """Whether any rule quantizes anything."""
        return any(rule.weight is not None for rule in self.rules)


@dataclass(frozen=True, kw_only=True)
class RunSpec(Spec):
    """One run of the command line or of a studio page. The folder of a run holds it as `spec.json`."""

    command: Command
    model: str
    recipes: tuple[Recipe, ...] = ()
    prompts: tuple[str, ...] = ()
    calibration_prompts: tuple[str, ...] = ()
    steps: int = 20
    guidance: float = 3.5
    seed: int = 0
    timing_rounds: int = 10
    backend: Literal["reference", "torch", "cpp"] | None = None  # None: the fastest that runs here
    sharing: SharingSpec | None = None  # of the attention command: the threshold and time groups to plan with

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 200:
            raise RecipeError(f"steps: got {self.steps}; allowed is 2 to 200.")
        if not 1 <= self.guidance <= 30:
            raise RecipeError(f"guidance: got {self.guidance}; allowed is 1 (off) to 30.")
        if not 0 <= self.seed < 2**31:
            raise RecipeError(f"seed: got {self.seed}; allowed is 0 to {2**31 - 1}.")
        if not 1 <= self.timing_rounds <= 1000:
            raise RecipeError(f"timing_rounds: got {self.timing_rounds}; allowed is 1 to 1000.")
        if self.command == "attention" and self.guidance == 1:
            raise RecipeError("guidance: got 1, which has one branch; give more than 1 to compare two branches.")
        for prompt in (*self.prompts, *self.calibration_prompts):
            check_prompt(prompt)
        for recipe in self.recipes:
            if (groups := recipe.time.groups_in(self.steps)) > self.steps:
                raise RecipeError(
                    f"groups: got {groups} timestep groups for {self.steps} steps in {recipe.name}; "
                    "use at most as many groups as steps."
                )


MAX_PROMPT = 500


def check_prompt(prompt: str) -> str:
    """`prompt` without surrounding blanks; RecipeError if it is empty or too long."""
    text = prompt.strip()
    if not text:
        raise RecipeError("prompt: it is empty; write what the picture should show, such as red apple.")
    if len(text) > MAX_PROMPT:
        raise RecipeError(f"prompt: got {len(text):,} characters; allowed are at most {MAX_PROMPT}, shorten it.")
    return text
