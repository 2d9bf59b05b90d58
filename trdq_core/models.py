"""Which models can be picked, and loading one."""

from __future__ import annotations

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
        _embedded(
            "pocket-video", "video", "Latte of 15 M parameters, trained on moving 3D emoji, 16 frames, 64 pixels.",
            missing="runs and pages for clips are still to be built; load its folder with diffusers meanwhile",
        ),
        ModelInfo(
            "random-dit", None, "speed", "DiT of 12 layers, 6 heads of 64, 256 tokens, random weights: for speed only.",
            True, "",
        ),
    ]  # fmt: skip


def _embedded(name: str, kind: str, description: str, missing: str = "") -> ModelInfo:
    """A model that comes with the repository; `missing` says what this version lacks for it."""
    there = (ASSETS / name / "model_index.json").is_file()
    reason = missing if there else f"its folder assets/{name} is missing; clone the repository again"
    return ModelInfo(name, ASSETS / name, kind, description, there and not missing, reason)


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
