"""What a checkpoint says of itself: plain data that stands in the header of each of its safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trdq_core.errors import CheckpointError
from trdq_core.specs import Recipe, Spec

FORMAT_VERSION = 2  # the newest that is read
FIRST_VERSION = 1  # and what is written where nothing needs a newer one
KEY = "trdq"  # of the metadata of a safetensors file
SET_PREFIX = "trdq.sets."  # tensors of the switched sets after the first, which stands under the layers' own names
GREATEST = 64 << 20  # characters; the table of a model of ten thousand tensors takes two million


@dataclass(frozen=True, kw_only=True)
class LayerEntry(Spec):
    """A linear of the denoiser, quantized or not, as `LayerInfo` has it."""

    name: str
    role: str
    leader: str
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True)
class InputEntry(Spec):
    """One quantized input and the linears that read it; their rule in the recipe says the rest.

    rotation, second_rotation: the sizes of dense rotations, 0 for none. ranges: low and high of static grids in turns.
    """

    layers: tuple[str, ...]
    sets: int = 1
    scale: bool = False
    permutation: bool = False
    rotation: int = 0
    second_rotation: int = 0
    hadamard_block: int = 0
    rank: int = 0
    clips: tuple[float, ...] = (1.0,)
    ranges: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttentionEntry(Spec):
    """The grids of one attention with quantized products; scales are fp32 numbers, one for each head."""

    name: str
    q_scale: tuple[float, ...]
    k_scale: tuple[float, ...]
    v_scale: tuple[float, ...]
    bits: int
    softmax_bits: int
    thresholds: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TimeEntry(Spec):
    """Where the denoiser is told the time, and how it counts: `TimeArgument`."""

    name: str = "timestep"
    position: int | None = None
    scale: float = 1.0
    flipped: bool = False


@dataclass(frozen=True, kw_only=True)
class TensorEntry(Spec):
    """One stored tensor: its type as safetensors writes it ("F32"), its shape, the SHA-256 of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Spec):
    """Everything about a quantized denoiser that is not a tensor. `config` is the model's, to tell a changed one."""

    format_version: int = FIRST_VERSION
    recipe: Recipe
    model_class: str
    argument: TimeEntry = field(default_factory=TimeEntry)
    edges: tuple[float, ...] = ()
    calibrated: tuple[float, ...] = ()  # lowest and highest timestep of the calibration
    calibration: str | None = None  # its fingerprint
    dtype: str = "float32"  # of what stayed in full precision
    packed_bytes: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Any] = field(default_factory=dict)  # dtypes of buffers that no checkpoint holds
    layers: tuple[LayerEntry, ...] = ()
    inputs: tuple[InputEntry, ...] = ()
    attention: tuple[AttentionEntry, ...] = ()
    tensors: tuple[TensorEntry, ...] = ()

    def text(self) -> str:
        """The manifest with its own digest, as it stands in a header."""
        plain = json.loads(canonical(self.to_dict()))
        return canonical({**plain, "digest": _digest(plain)})


def canonical(data: object) -> str:
    """JSON with one spelling; NaN and infinity have none."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_manifest(text: str, where: str) -> Manifest:
    """The manifest in a header; CheckpointError says whether it is damaged, newer, or no manifest at all."""
    if len(text) > GREATEST:
        raise CheckpointError(f"{where}: its description has {len(text):,} characters; allowed are {GREATEST:,}.")
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: its description is not JSON ({str(error)[:80]}); save the model again."
        ) from error
    check_version(data.get("format_version"), where)
    digest = data.pop("digest", None)
    try:
        if digest != _digest(data):
            raise CheckpointError(f"{where}: its description does not match its digest, it was changed; copy it again.")
        return Manifest.from_dict(data)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: its description cannot be used ({str(error)[:160]}); copy it again."
        ) from error


def check_version(version: object, where: str) -> None:
    """CheckpointError unless this version of the library reads checkpoints of `version`."""
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{where}: format_version is {version!r:.40}; it has to be a number from 1, copy it again."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format {version} is newer than {FORMAT_VERSION}, which this version reads; update TR-DQ Studio."
        )


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(data).encode()).hexdigest()
