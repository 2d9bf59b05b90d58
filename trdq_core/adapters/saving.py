"""Saving quantized models as folders that diffusers loads."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import nn

from trdq_core.checkpoints.card import model_card
from trdq_core.checkpoints.describe import conversion_of
from trdq_core.convert import Conversion
from trdq_core.errors import CheckpointError, StorageError

PICTURE = "picture.png"


class Saved(NamedTuple):
    """A folder that was written, and the bytes in it."""

    folder: Path
    nbytes: int
    denoiser_bytes: int  # of the quantized model's own files


def prepare(model: nn.Module) -> Conversion:
    """The conversion of a denoiser that is about to be saved; CheckpointError for a copy of one, and for other libraries'."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    conversion = conversion_of(model)
    if conversion.denoiser is not model:
        raise CheckpointError(
            f"{type(model).__name__}: it is a copy of a quantized model; save the model that was converted or loaded."
        )
    if not isinstance(model, ModelMixin):
        raise CheckpointError(
            f"{type(model).__name__}: only denoisers of diffusers can be saved; this one is of another library."
        )
    model.is_quantized = True  # from now on diffusers refuses to cast it
    return conversion


def save_quantized(
    model: DiffusionPipeline | nn.Module | Conversion,
    folder: str | Path,
    *,
    name: str | None = None,
    report: Mapping[str, Any] | None = None,
    picture: np.ndarray | None = None,
    max_shard_size: int | str = "5GB",
    push_to_hub: str | None = None,
) -> Saved:
    """Write a quantized pipeline or denoiser into a new folder, with a model card; diffusers loads it from there.

    `name` is the model's, `report` that of a run with its recipe, `picture` (height, width, 3) uint8, all for the card;
    `push_to_hub` an id to upload the folder to. CheckpointError if nothing in `model` was quantized, StorageError if the
    folder is taken, the disk full or the hub out of reach; nothing half-written stays.
    """
    target = Path(folder)
    check_target(target, push_to_hub)
    denoisers = _denoisers(model)
    conversions = [prepare(denoiser) for denoiser in denoisers.values()]
    source = model.denoiser if isinstance(model, Conversion) else model
    pipeline = None if isinstance(source, nn.Module) else type(source).__name__
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        source.save_pretrained(partial, max_shard_size=max_shard_size)
        nbytes = sum(folder_bytes(partial / part) for part in denoisers)
        if picture is not None:
            Image.fromarray(picture).save(partial / PICTURE)
        card = _card(conversions[0], pipeline, nbytes, name, report, PICTURE if picture is not None else None)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            target.rmdir()
        partial.replace(target)
    except OSError as error:
        raise StorageError(
            f"{target.name}: could not be written ({error.strerror or error}); free some disk space or give another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if push_to_hub is not None:
        upload(target, push_to_hub)
    return Saved(target, folder_bytes(target), nbytes)


def check_target(folder: Path, hub_id: str | None = None) -> None:
    """StorageError if `folder` is taken, or `hub_id` names no repository of somebody on the hub."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise StorageError(f"{folder.name}: there is something in this folder already; give a new one.")
    if hub_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", hub_id):
        raise StorageError(f"push-to-hub: got {hub_id!r:.100}; give OWNER/NAME, such as somebody/pocket-image-w4a8.")


def upload(folder: Path, hub_id: str) -> None:
    """Upload a saved folder; StorageError if that fails, the folder stays either way."""
    try:
        api = HfApi()
        api.create_repo(hub_id, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Quantized with TR-DQ Studio")
    # The client's HTTP library is its own affair, so what it raises without a network is taken from where the client names it.
    except (HfHubHTTPError, *HfHubHTTPError.__bases__, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:160]
        raise StorageError(
            f"push-to-hub: {hub_id} could not be uploaded ({reason}); log in with hf auth login. The model is in {folder.name}."
        ) from error


def load_denoiser(folder: Path, kind: type[nn.Module]) -> nn.Module:
    """The denoiser of class `kind` in a saved folder, of a pipeline or alone, as diffusers loads it."""
    index = folder / "model_index.json"
    part = None
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8")).items()
        part = next(name for name, value in parts if isinstance(value, list) and value[-1] == kind.__name__)
    assert issubclass(kind, ModelMixin)  # nothing else is saved
    return kind.from_pretrained(folder, subfolder=part, local_files_only=True)


def _card(
    conversion: Conversion,
    pipeline: str | None,
    nbytes: int,
    name: str | None,
    report: Mapping[str, Any] | None,
    picture: str | None,
) -> str:
    report = report or {}
    row = (report.get("recipes") or {}).get(conversion.recipe.name)
    return model_card(
        conversion, pipeline=pipeline, denoiser_bytes=nbytes, base=name or report.get("model"), row=row,
        calibration=report.get("calibration"), picture=picture,
    )  # fmt: skip


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _denoisers(model: DiffusionPipeline | nn.Module | Conversion) -> dict[str, nn.Module]:
    """The quantized denoisers of a pipeline by the name of their part; one without a name where there is no pipeline."""
    if isinstance(model, Conversion):
        return {"": model.denoiser}
    if isinstance(model, nn.Module):
        return {"": model}
    found = {
        name: part
        for name, part in model.components.items()
        if isinstance(getattr(part, "trdq_conversion", None), Conversion)
    }
    if not found:
        raise CheckpointError(
            f"{type(model).__name__}: none of its parts was quantized by TR-DQ Studio; put the denoiser of a conversion in it."
        )
    return found
