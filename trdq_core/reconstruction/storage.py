"""Finished units on disk, so that a killed run goes on with the next one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trdq_core.errors import StorageError
from trdq_core.reconstruction.soft import SoftLinear

FORMAT_VERSION = 1


class UnitStore:
    """One folder for one reconstruction. Unit i is `unit-000.safetensors`, which weights take their upper neighbour, one byte
    each, and `unit-000.json`, what is known of it and a digest of everything its result depends on.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, index: int, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The stored choice (out, in) bool by layer, and facts, of a unit; None if it was not finished with this digest."""
        if self.folder is None:
            return None
        try:
            facts = json.loads(self._file(index, "json").read_text())
            if facts.pop("digest") != digest or facts.pop("format_version") != FORMAT_VERSION:
                return None
            stored = load_file(self._file(index, "safetensors"))
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        return {name: tensor.bool() for name, tensor in stored.items()}, facts

    def save(self, index: int, digest: str, upwards: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a finished unit, its description last: what has one is whole. StorageError if the disk is full."""
        if self.folder is None:
            return
        tensors, text = self._file(index, "safetensors"), self._file(index, "json")
        partial = tensors.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text.unlink(missing_ok=True)
            save_file({name: choice.to(torch.uint8).contiguous() for name, choice in upwards.items()}, partial)
            partial.replace(tensors)
            partial.write_text(json.dumps({"format_version": FORMAT_VERSION, "digest": digest, **facts}, indent=1))
            partial.replace(text)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StorageError(
                f"reconstruction: unit {index} could not be written ({error}); free some disk space."
            ) from error

    def _file(self, index: int, suffix: str) -> Path:
        assert self.folder is not None  # asked by load and save only
        return self.folder / f"unit-{index:03d}.{suffix}"


def digest_of(parts: Iterable[object]) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(list(parts), default=str).encode()).hexdigest()[:16]


def digest_of_linear(linear: SoftLinear) -> str:
    """A digest of what is learned for a linear: both neighbours of every weight, its transform and the grid of its input."""
    digest = hashlib.sha256(f"{linear.linear.name}{linear.linear.input}".encode())
    transform = (part for part in linear.linear.transform if isinstance(part, Tensor))
    for tensor in (*linear.neighbours, *transform):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
