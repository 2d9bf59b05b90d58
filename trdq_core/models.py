"""Which models can be picked, and loading one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trdq_core import local_models
from trdq_core.errors import ModelError
from trdq_core.hub import store
from trdq_core.hub.known import KNOWN_MODELS
from trdq_core.specs import DEFAULT_LOADING, Loading

if TYPE_CHECKING:
    from trdq_core.memory import Device, Preflight
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
    source: str = "repository"  # "folder" under --model-root, or "hub"
    repo: str | None = None
    revision: str | None = None  # of the hub: the commit that is here or would be fetched


def models() -> list[ModelInfo]:
    """The models that can be picked: those of the repository, folders under --model-root, those of the hub. No network."""
    found = [*_of_the_repository(), *_of_the_root(), *_of_the_hub()]
    return list({info.name: info for info in reversed(found)}.values())[::-1]  # of two with one name the first counts


def _of_the_repository() -> list[ModelInfo]:
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
    return local_models.kind_of_folder(Path(name))


def _of_the_root() -> list[ModelInfo]:
    """Folders under --model-root, by their own names."""
    return [
        ModelInfo(one.name, one.folder, one.kind, one.description, not one.reason, one.reason, "folder")
        for one in local_models.under_root()
    ]


def _of_the_hub() -> list[ModelInfo]:
    """The closed list, and whatever else was downloaded."""
    here = {one.repo: one for one in store.downloaded()}
    found = []
    for model in KNOWN_MODELS:
        one = here.pop(model.repo, None)
        reason = "" if one else f"not on this machine; fetch it with: download {model.name}"
        folder = store.folder_of(model.repo) if one else None
        revision = one.revision if one else model.revision
        found.append(
            ModelInfo(model.name, folder, model.kind, model.description, bool(one), reason, "hub", model.repo, revision)
        )
    for one in here.values():
        kind, said = local_models.kind_of_folder(one.folder), f"{one.repo} of the hub."
        found.append(ModelInfo(one.name, one.folder, kind, said, True, "", "hub", one.repo, one.revision))
    return found


def listed_name(name: str) -> str:
    """What a model is called in lists and stored statistics: its name, that of a hub id, or a folder's own."""
    by_repo = {info.repo: info.name for info in models() if info.repo}
    return by_repo.get(name, Path(name).name)


def find_folder(name: str) -> Path | None:
    """The folder of the model `name`, None for the one with random weights; ModelError if there is no such model."""
    known = {info.name: info for info in models()}
    known |= {info.repo: info for info in known.values() if info.repo}
    info = known.get(name)
    if info is None and not Path(name).exists():
        names = ", ".join(key for key, one in known.items() if key == one.name)
        raise ModelError(f"model: got {name!r}; known models are {names}, or give a diffusers folder.")
    if info is not None and not info.available:
        raise ModelError(f"model {name}: not available, {info.reason}.")
    return info.path if info is not None else Path(name)


def memory_of(
    name: str, device: Device | None = None, loading: Loading = DEFAULT_LOADING
) -> Preflight | None:  # fmt: skip
    """What a model needs in memory and what there is, before it is loaded; None for the one with random weights.

    `device` is where it would run; by default a GPU if torch sees one. ModelError where there is nothing to offload from.
    """
    folder = find_folder(name)
    from trdq_core.adapters.precision import check_loading, default_device
    from trdq_core.memory import preflight

    device = device or default_device()
    check_loading(name, folder, loading, device)
    return preflight(name, folder, device, loading)


def load_model(
    name: str,
    *,
    anyway: bool = True,
    size: Mapping[str, int] | None = None,
    loading: Loading = DEFAULT_LOADING,
) -> SampledModel:
    """The model called `name`, or in the diffusers folder `name` (command line only); ModelError says what is wrong.

    `size` holds height, width and frames where they are not the model's own; ModelError if it does not make that size.
    `loading` says in which precision, and what of it is offloaded. Unless `anyway`, MemoryShort where it needs more memory
    than there is.
    """
    folder = find_folder(name)
    from trdq_core.adapters.precision import check_loading, default_device

    check_loading(name, folder, loading, default_device())
    if not anyway:
        from trdq_core.memory import check_memory

        check_memory(memory_of(name, loading=loading))
    from trdq_core.adapters import load_adapter  # diffusers takes seconds to import; listing models must not wait

    return load_adapter(listed_name(name), folder, size, loading)


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
