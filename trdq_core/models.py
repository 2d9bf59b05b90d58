"""Which models can be picked, and loading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trdq_core.errors import ModelError

if TYPE_CHECKING:
    from trdq_core.plan import LayerInfo
    from trdq_core.sampling import SampledModel

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class ModelInfo(NamedTuple):
    """A model that can be picked. `reason` says why an unavailable one is so."""

    name: str
    path: Path | None
    kind: str  # "image", "video", or "speed" for random weights that only show latency
    description: str
    available: bool
    reason: str


def models() -> list[ModelInfo]:
    """The models that can be picked."""
    return [
        _embedded("pocket-image", "image", "PixArt-Sigma of 10 M parameters, trained on 3D emoji, 128 pixels."),
        _embedded("pocket-video", "video", "Latte of 15 M parameters, trained on moving 3D emoji, 16 frames, 64 pixels."),
        ModelInfo(
            "random-dit", None, "speed", "DiT of 12 layers, 6 heads of 64, 256 tokens, random weights: for speed only.",
            True, "",
        ),
        ModelInfo(
            "random-pixart-xl", None, "speed", "4 layers of PixArt-XL, 1152 wide, 256 tokens, random weights: for speed only.",
            True, "",
        ),
        ModelInfo(
            "random-pixart-xl-28", None, "speed", "PixArt-XL whole, 28 layers, 0.6 B, 256 tokens, random weights.", True, "",
        ),
    ]  # fmt: skip


def _embedded(name: str, kind: str, description: str) -> ModelInfo:
    """A model that comes with the repository."""
    there = (ASSETS / name / "model_index.json").is_file()
    reason = "" if there else f"its folder assets/{name} is missing; clone the repository again"
    return ModelInfo(name, ASSETS / name, kind, description, there, reason)


def kind_of(name: str) -> str:
    """The kind of a model, listed or a diffusers folder, without loading it: "image", "video" or "speed".

    A folder whose transformer has three dimensions makes clips: diffusers ends the names of those classes alike. What is
    no model is taken for one of pictures; loading it says what is wrong.
    """
    listed = next((info.kind for info in models() if info.name == name), None)
    if listed is not None:
        return listed
    try:
        index = json.loads((Path(name) / "model_index.json").read_text(encoding="utf-8"))
        transformer = str(index["transformer"][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "image"
    return "video" if transformer.endswith("Transformer3DModel") else "image"


def find_folder(name: str) -> Path | None:
    """The folder of the model `name`, None for the one with random weights; ModelError if there is no such model."""
    known = {info.name: info for info in models()}
    info = known.get(name)
    if info is None and not Path(name).exists():
        raise ModelError(f"model: got {name!r}; known models are {', '.join(known)}, or give a diffusers folder.")
    if info is not None and not info.available:
        raise ModelError(f"model {name}: not available, {info.reason}.")
    return info.path if info is not None else Path(name)


def load_model(name: str) -> SampledModel:
    """The model called `name`, or in the diffusers folder `name` (command line only); ModelError says what is wrong."""
    folder = find_folder(name)
    from trdq_core.adapters import load_adapter  # diffusers takes seconds to import; listing models must not wait

    return load_adapter(name, folder)


def layers_of_model(name: str) -> tuple[LayerInfo, ...]:
    """The linears of a model, from its configuration alone."""
    folder = find_folder(name)
    from trdq_core.adapters import layers_of

    return layers_of(name, folder)


def notes_of_model(name: str) -> tuple[str, ...]:
    """What of a model could not be placed in its plan, one sentence each, from its configuration alone."""
    folder = find_folder(name)
    from trdq_core.adapters import notes_of

    return notes_of(folder)
