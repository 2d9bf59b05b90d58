"""The safetensors files of a checkpoint, and the checks before anything in them is believed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trdq_core.checkpoints.codes import DATA, check_sums, integers
from trdq_core.checkpoints.manifest import KEY, SET_PREFIX, Manifest, TensorEntry, read_manifest
from trdq_core.errors import CheckpointError
from trdq_core.plan import LayerInfo, rule_for

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
MOST_FILES = 10_000


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint with what their headers agree on. `places` tells which file holds a tensor."""

    files: tuple[Path, ...]
    manifest: Manifest
    places: Mapping[str, Path]

    @property
    def folder(self) -> str:
        """The name of the folder, for sentences."""
        return self.files[0].parent.name


def open_checkpoint(files: Sequence[str | Path]) -> Checkpoint:
    """Read the headers of `files`; CheckpointError if they are not what the manifest they carry says.

    Every file has to be safetensors in one folder and carry the same manifest, and every tensor in the manifest has to
    stand in exactly one of them with the type and shape that are said.
    """
    paths = [Path(file) for file in files]
    _check_names(paths)
    texts, places, found = set(), {}, {}
    for path in paths:
        try:
            with safe_open(path, "pt") as stored:
                metadata = stored.metadata() or {}
                texts.add(metadata.get(KEY))
                if set(metadata) - {KEY} != {"format"} or metadata["format"] != "pt":
                    raise CheckpointError(f"{path.name}: its header is not one that saving writes; copy it again.")
                for name in stored.keys():  # noqa: SIM118 - the handle is no mapping
                    if name in places:
                        raise CheckpointError(f"{path.name}: {name:.100} stands in two files; copy the folder again.")
                    part = stored.get_slice(name)
                    places[name], found[name] = path, (part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path.name}: cannot be read ({str(error)[:100]}); it is damaged, copy it again."
            ) from error
    where = paths[0].name
    if None in texts:
        raise CheckpointError(
            f"{where}: it does not describe a model quantized by TR-DQ Studio, but its folder says so; copy it again."
        )
    if len(texts) > 1:
        raise CheckpointError(f"{where}: the shards belong to different checkpoints; copy all of one folder again.")
    text = texts.pop()
    manifest = read_manifest(text, where)
    _check_table(manifest, found, where)
    if len(paths) > 1:
        _check_index(paths[0].parent, text, places)
    return Checkpoint(tuple(paths), manifest, places)


def check_contents(checkpoint: Checkpoint) -> None:
    """Read every tensor once; CheckpointError if its bytes are not those that were saved, or would be unsafe to use."""
    by_file: dict[Path, list[TensorEntry]] = {}
    for entry in checkpoint.manifest.tensors:
        by_file.setdefault(checkpoint.places[entry.name], []).append(entry)
    for path, entries in by_file.items():
        with safe_open(path, "pt") as stored:
            for entry in entries:
                tensor = stored.get_tensor(entry.name)
                if tensor_digest(tensor) != entry.sha256:
                    raise CheckpointError(
                        f"{entry.name:.100}: its bytes in {path.name} are not those that were saved; copy the file again."
                    )
                if entry.name.endswith(".permutation"):
                    _check_permutation(entry.name, tensor)
                if entry.name.endswith(".column_sum"):
                    _check_sums(checkpoint, entry.name, tensor)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"{entry.name:.100}: it holds NaN or infinity in {path.name}; load another copy of the model."
                    )


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes as safetensors writes them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(memoryview(flat.view(torch.uint8).numpy())).hexdigest()


def describe_tensors(
    tensors: Mapping[str, Tensor], digest: Callable[[Tensor], str] = tensor_digest
) -> tuple[TensorEntry, ...]:
    """The table of tensors that are about to be saved."""
    return tuple(
        TensorEntry(name=name, dtype=dtype_name(name, tensor), shape=tuple(tensor.shape), sha256=digest(tensor))
        for name, tensor in sorted(tensors.items())
    )


def dtype_name(name: str, tensor: Tensor) -> str:
    """What safetensors calls a tensor's type; CheckpointError for one that checkpoints do not hold."""
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{name}: tensors of {tensor.dtype} cannot be saved; load the model in another precision."
        )
    return DTYPE_NAMES[tensor.dtype]


def _check_names(paths: Sequence[Path]) -> None:
    if not 0 < len(paths) <= MOST_FILES:
        raise CheckpointError(f"checkpoint: got {len(paths)} files; allowed are 1 to {MOST_FILES:,}.")
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path.name:.100}: only safetensors are read, never pickles; save the model again with save_quantized."
            )
        if path.parent != paths[0].parent or ".." in path.parts:
            raise CheckpointError(f"{path.name:.100}: a shard outside the model's folder is not read; copy it again.")


def _check_index(folder: Path, text: str, places: Mapping[str, Path]) -> None:
    """The index beside the shards says the same as their headers."""
    for file in folder.glob("*.safetensors.index.json"):
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
            told, metadata = index["weight_map"], index["metadata"]
            same = told == {name: path.name for name, path in places.items()} and metadata[KEY] == text
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{file.name}: it cannot be read ({str(error)[:80]}); copy it again.") from error
        if not same:
            raise CheckpointError(
                f"{file.name}: it says something else than the shards' headers; copy the folder again."
            )


def _check_table(manifest: Manifest, found: Mapping[str, tuple[Any, tuple[int, ...]]], where: str) -> None:
    told = {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors}
    for name, sign in _first_difference(told, found):
        reason = {-1: "is missing", 1: "is not in the description", 0: "has another type or shape than described"}[sign]
        raise CheckpointError(f"{where}: tensor {name:.100} {reason}; copy the folder again.")


def _first_difference(told: Mapping[str, Any], found: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    for name in sorted({*told, *found}):
        if name not in found:
            yield name, -1
        elif name not in told:
            yield name, 1
        elif told[name] != found[name]:
            yield name, 0


def _check_sums(checkpoint: Checkpoint, name: str, sums: Tensor) -> None:
    """The sums (sets, out) of a layer's integers, with which zero points are taken out of a product."""
    prefix = name.removesuffix("column_sum")
    layer = re.sub(rf"^{re.escape(SET_PREFIX)}\d+\.", "", prefix).removesuffix(".")
    told = next(one for one in checkpoint.manifest.layers if one.name == layer)
    rule = rule_for(LayerInfo(**told.to_dict()), checkpoint.manifest.recipe)
    assert rule is not None and rule.weight is not None  # what was put into the model is what the recipe quantizes
    data, scales = _tensor(checkpoint, f"{prefix}{DATA}"), _tensor(checkpoint, f"{prefix}group_scale")
    assert data is not None  # it has sums
    for index, one in enumerate(data):
        values = integers(one, rule.weight.bits, told.out_features, told.in_features)
        check_sums(name, values, sums[index], None if scales is None else scales[index])


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor | None:
    if name not in checkpoint.places:
        return None
    with safe_open(checkpoint.places[name], "pt") as stored:
        return stored.get_tensor(name)


def _check_permutation(name: str, tensor: Tensor) -> None:
    """Kernels read where a permutation points, so one that points elsewhere must never reach them."""
    order = torch.arange(tensor.shape[-1], dtype=tensor.dtype)
    if not all(torch.equal(row.sort().values, order) for row in tensor.reshape(-1, tensor.shape[-1])):
        raise CheckpointError(f"{name:.100}: it is no permutation of its channels; copy the file again.")
