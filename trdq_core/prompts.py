"""The prompts that runs start with where nobody typed any: lists beside the models, one for pictures and one for clips.

The command line and the page take them from here, so that one finds the other's calibrations. No torch.
"""

from __future__ import annotations

import json

from trdq_core.errors import StorageError
from trdq_core.models import ASSETS, kind_of

PROMPTS_FILE = ASSETS / "prompts.json"
VIDEO_PROMPTS_FILE = ASSETS / "pocket-video" / "prompts.json"
FALLBACK_PROMPTS = (
    "red apple", "owl", "hot air balloon", "tiger", "sunflower", "slice of pizza", "octopus", "snowman",
    "rocket", "crab", "bread", "fire engine", "cherry blossom", "whale", "teddy bear", "mushroom",
)  # fmt: skip
CALIBRATION_PROMPTS = 16


def stored_prompts(model: str) -> dict[str, tuple[str, ...]]:
    """The lists for `model` by name, "calibration" and "evaluation" among them; StorageError if there is no such file.

    `model` is a listed name or a diffusers folder; what makes clips gets the names that pocket-video was trained on.
    """
    file = VIDEO_PROMPTS_FILE if kind_of(model) == "video" else PROMPTS_FILE
    try:
        lists = json.loads(file.read_text(encoding="utf-8"))
        return {name: tuple(map(str, texts)) for name, texts in lists.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        shown = file.relative_to(ASSETS.parent) if file.is_relative_to(ASSETS.parent) else file.name
        raise StorageError(f"prompts: {shown} cannot be read ({error}); clone the repository again.") from error


def prompts_for(model: str, which: str) -> tuple[str, ...]:
    """One list for `model`; a short built-in one where its file lacks that list or cannot be read."""
    try:
        return stored_prompts(model).get(which, FALLBACK_PROMPTS)
    except StorageError:
        return FALLBACK_PROMPTS
