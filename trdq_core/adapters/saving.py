"""Saving quantized models as folders that diffusers loads."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from trdq_core.adapters.quantizer import TRDQConfig, TRDQMethod, TRDQQuantizer
from trdq_core.checkpoints.describe import conversion_of
from trdq_core.convert import Conversion
from trdq_core.errors import CheckpointError, StorageError


class Saved(NamedTuple):
    """A folder that was written, and the bytes in it."""

    folder: Path
    nbytes: int
    denoiser_bytes: int  # of the quantized model's own files


def prepare(conversion: Conversion) -> ModelMixin:
    """Make a converted denoiser one that `save_pretrained` writes as what it is; CheckpointError if diffusers has none such."""
    denoiser = conversion.denoiser
    if not isinstance(denoiser, ModelMixin):
        raise CheckpointError(
            f"{type(denoiser).__name__}: only denoisers of diffusers can be saved; this one is of another library."
        )
    if not isinstance(getattr(denoiser, "hf_quantizer", None), TRDQQuantizer):
        quantizer = TRDQQuantizer(TRDQConfig(conversion.recipe), pre_quantized=True)
        quantizer.adopt(conversion)
        denoiser.hf_quantizer = quantizer
        denoiser.is_quantized, denoiser.quantization_method = True, TRDQMethod.TRDQ
    return denoiser


def save_quantized(
    model: DiffusionPipeline | nn.Module | Conversion, folder: str | Path, *, max_shard_size: int | str = "5GB"
) -> Saved:
    """Write a quantized pipeline or denoiser into a new folder, from which diffusers loads it again.

    CheckpointError if nothing in `model` was quantized, StorageError if the folder is taken or the disk full; nothing
    half-written stays.
    """
    target = Path(folder)
    denoisers = _denoisers(model)
    for denoiser in denoisers.values():
        prepare(conversion_of(denoiser))
    source = model.denoiser if isinstance(model, Conversion) else model
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise StorageError(f"{target.name}: there is something in this folder already; give a new one.")
        source.save_pretrained(partial, max_shard_size=max_shard_size)
        if target.exists():
            target.rmdir()
        partial.replace(target)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{target.name}: could not be written ({error.strerror or error}); free some disk space or give another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    parts = [target / name if name else target for name in denoisers]
    return Saved(target, folder_bytes(target), sum(folder_bytes(part) for part in parts))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _denoisers(model: DiffusionPipeline | nn.Module | Conversion) -> dict[str, nn.Module]:
    """The quantized denoisers of a pipeline by the name of their part; one without a name where there is no pipeline."""
    if isinstance(model, Conversion):
        return {"": model.denoiser}
    if isinstance(model, nn.Module):
        conversion_of(model)
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
