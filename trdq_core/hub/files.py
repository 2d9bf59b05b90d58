"""What of a repository is fetched: JSON, tokenizers and safetensors of the named components; never pickles, never code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trdq_core.errors import ModelError
from trdq_core.hub.known import KNOWN_MODELS, HubModel

LIBRARIES = ("diffusers", "transformers")  # whose classes a model may name; others would be code of its own
KEPT = (".json", ".txt", ".model", ".safetensors", ".jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_INSIDE = re.compile(r"\w+/[\w-][\w.-]*", re.ASCII)  # a component's own file: nothing above it, nothing deeper
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|non_ema|ema)[.-]")


def check_id(text: str) -> str:
    """`text` if it has the form owner/name of the hub and can be no path; ModelError otherwise."""
    if not _ID.fullmatch(text) or ".." in text or "--" in text or text.endswith((".", ".git")):
        raise ModelError(f"model: got {text[:80]!r}; an id of the hub is owner/name, such as maxin-cn/Latte-1.")
    return text


def wanted(name: str) -> HubModel:
    """The model of the closed list with this name or id, else the newest revision of any id; ModelError if it is none."""
    known = next((model for model in KNOWN_MODELS if name in (model.name, model.repo)), None)
    if known is not None:
        return known
    if "/" not in name:
        names = ", ".join(model.name for model in KNOWN_MODELS)
        raise ModelError(f"model: got {name[:80]!r}; models of the hub are {names}, or give an id such as owner/name.")
    return HubModel(check_id(name).replace("/", "--"), name, None, "image", f"{name} of the hub.")


def wanted_files(repo: str, index: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The files of a repository to fetch, by its model index; ModelError if it needs code or pickles, or has no transformer."""
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(f"model {repo}: its pipeline is code of its own, which is never run; choose another model.")
    parts = {name: value for name, value in index.items() if isinstance(value, list) and any(value)}
    for name, value in parts.items():
        if value[0] not in LIBRARIES:
            raise ModelError(
                f"model {repo}: {name} is of {str(value[0])[:40]!r}, code that is never run; allowed are diffusers and "
                "transformers."
            )
    if "transformer" not in parts:
        raise ModelError(
            f"model {repo}: its pipeline {index['_class_name']} has no transformer; UNets are not quantized."
        )
    chosen = ["model_index.json"]
    for part in parts:
        inside = [name for name in names if _INSIDE.fullmatch(name) and name.startswith(f"{part}/")]
        kept = [name for name in inside if name.endswith(KEPT) and not _VARIANT.search(name)]
        pickled = any(name.endswith(PICKLES) for name in inside)
        if pickled and not any(name.endswith(".safetensors") for name in kept):
            raise ModelError(
                f"model {repo}: {part} has its weights as pickles only, which could run code; only safetensors are loaded."
            )
        chosen += sorted(kept)
    if not any(name.startswith("transformer/") and name.endswith(".safetensors") for name in chosen):
        raise ModelError(f"model {repo}: its transformer has no safetensors file; choose another model.")
    return chosen


def read_index(repo: str, file: Path) -> dict[str, Any]:
    """The model index of a repository; ModelError if it is damaged."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {repo}: its model_index.json is damaged ({error}).") from error
    if not isinstance(index, dict):
        raise ModelError(f"model {repo}: its model_index.json is no table of components.")
    return index
