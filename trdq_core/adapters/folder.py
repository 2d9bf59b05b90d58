"""Checks on a model folder before anything in it is loaded: what is refused, and in which words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trdq_core.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SAMPLE = 1 << 20  # bytes hashed at each end of a weight file


def check_folder(folder: Path, known_pipelines: Sequence[str] | None) -> dict[str, Any]:
    """The model index of a diffusers folder; ModelError says what is missing, damaged, foreign or refused.

    Without `known_pipelines` every pipeline with one transformer for a denoiser will do.
    """
    if not folder.is_dir():
        raise ModelError(
            f"model: there is no folder {folder.name}; give a diffusers folder that holds model_index.json."
        )
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            f"model {folder.name}: model_index.json is missing, so it is not a diffusers pipeline; "
            "save it with pipeline.save_pretrained first."
        )
    try:
        index = json.loads(index_file.read_text())
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model {folder.name}: model_index.json is damaged ({error}); copy the folder again."
        ) from error
    if known_pipelines is None:
        check_denoiser(folder.name, index)
    elif name not in known_pipelines:
        raise ModelError(f"model {folder.name}: its pipeline is {name}; supported are {', '.join(known_pipelines)}.")
    pickles = sorted(p.name for p in folder.rglob("*") if p.suffix.lower() in PICKLES)
    if pickles:
        raise ModelError(
            f"model {folder.name}: {pickles[0]} is a pickle file and could run code when opened; "
            "only safetensors are loaded, convert it with save_pretrained(safe_serialization=True)."
        )
    return index


def check_denoiser(model: str, index: Mapping[str, object]) -> None:
    """ModelError unless the components of a pipeline name one transformer, of diffusers itself, as the denoiser."""
    present = {name: part for name, part in index.items() if isinstance(part, list) and any(part)}
    transformer, unet = present.get("transformer"), present.get("unet")
    if transformer is None and unet is not None:
        raise ModelError(
            f"model {model}: its denoiser is a UNet ({unet[-1]}); only transformer denoisers are quantized here, "
            "choose a model with a transformer such as PixArt, SD3 or FLUX."
        )
    if transformer is None:
        raise ModelError(
            f"model {model}: its pipeline {index['_class_name']} has no component called transformer; only pipelines whose "
            "denoiser is a transformer are quantized here."
        )
    second = next((name for name in present if name.startswith("transformer_")), None)
    if second is not None:
        raise ModelError(
            f"model {model}: it has two denoisers, transformer and {second}; only pipelines with one are quantized here, "
            "choose one of the same family with a single transformer."
        )
    if transformer[0] != "diffusers":
        raise ModelError(
            f"model {model}: its transformer comes from {transformer[0]}, which would run code of the model's author; only "
            "transformers of diffusers itself are loaded."
        )


def check_weights(files: list[Path], folder: Path) -> None:
    """Open every weight file's header and look for values that are not finite; ModelError names file and tensor."""
    if not files:
        raise ModelError(f"model {folder.name}: the transformer has no safetensors file; copy the folder again.")
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensor = stored.get_tensor(key)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise ModelError(
                            f"model {folder.name}: {key} in {file.name} holds NaN or infinity; "
                            "the file is damaged or training diverged, load another one."
                        )
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model {folder.name}: {file.name} is truncated or damaged ({error}); copy the folder again."
            ) from error


def weights_digest(files: list[Path]) -> str:
    """A digest of weight files: sizes, and the first and last MiB of each (headers hold every name, dtype and shape)."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]
