"""What a model needs in memory and what there is, known from file headers before a single tensor is read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from trdq_core.errors import MemoryShort, ModelError

Device = Literal["cpu", "cuda"]
WORK_BYTES = 256 << 20  # activations, latents and the decoder's buffers, roughly; libraries are in memory already
DENOISER = "transformer"
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|non_ema|ema)[.-]")


class Component(NamedTuple):
    """One part of a pipeline: its parameters, their bytes on disk, and the parameters of its largest block."""

    name: str
    parameters: int
    stored_bytes: int
    largest_block: int


class Way(NamedTuple):
    """A way of loading, and what it needs."""

    name: str
    needs: int
    fits: bool


class Preflight(NamedTuple):
    """What loading a model and keeping one quantized copy of its denoiser needs, and what is free, in bytes."""

    model: str
    device: Device
    dtype: str
    components: tuple[Component, ...]
    needs: int
    has: int
    ways: tuple[Way, ...]  # others, from the least change to the most

    @property
    def fits(self) -> bool:
        """Whether it can be loaded as it is."""
        return self.needs <= self.has

    def sentence(self) -> str:
        """What it needs and has, and what to do where that does not fit; one sentence."""
        where = "GPU memory" if self.device == "cuda" else "memory"
        said = f"model {self.model}: needs about {gigabytes(self.needs)} of {where} in {self.dtype}"
        if self.fits:
            return f"{said}, {gigabytes(self.has)} are free."
        ways = [f"{way.name} {gigabytes(way.needs)}{'' if way.fits else ' (too much)'}" for way in self.ways]
        others = f"; it would need {', '.join(ways)}" if ways else ""
        return f"{said} and {gigabytes(self.has)} are free{others}; free some, choose a smaller model, or load it --anyway."


def gigabytes(count: float) -> str:
    """Bytes as people say them: 0.05 GB, 12.3 GB."""
    return f"{count / 1e9:.2f} GB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def components_of(folder: Path) -> tuple[Component, ...]:
    """The parts of a diffusers folder that hold weights, from the headers of their files; ModelError if one is damaged."""
    parts = (part for part in sorted(folder.iterdir()) if part.is_dir()) if folder.is_dir() else ()
    return tuple(_component(part, files) for part in parts if (files := weight_files(part)))


def weight_files(part: Path) -> list[Path]:
    """The safetensors files of one part that are loaded: those of its index, else all that are no other precision's."""
    plain = sorted(file for file in part.glob("*.safetensors") if not _VARIANT.search(file.name))
    for index in sorted(part.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue  # loading says what is wrong with it
        shards = [file for file in plain if file.name in names]
        return shards or plain
    return plain


def _component(part: Path, files: list[Path]) -> Component:
    from safetensors import SafetensorError, safe_open

    blocks: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, "np") as stored:
                for key in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                    blocks[_block_of(key)] += math.prod(stored.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model {part.parent.name}: {part.name}/{file.name} is truncated or damaged ({error}); copy the folder again."
            ) from error
    size = sum(file.stat().st_size for file in files)
    return Component(part.name, sum(blocks.values()), size, max(blocks.values(), default=0))


def _block_of(key: str) -> str:
    """The block a tensor is part of: its name up to the first number, else its first word."""
    found = re.match(r"(.*?\.\d+)\.", key)
    return found[1] if found else key.partition(".")[0]


def preflight(name: str, folder: Path | None, device: Device) -> Preflight | None:
    """What the model in `folder` needs on `device` and what that has; None for the built-in one of random weights."""
    if folder is None:
        return None
    parts = components_of(folder)
    width, dtype = (2, "float16") if device == "cuda" else (4, "float32")
    has = free_gpu_memory() if device == "cuda" else free_memory()
    ways = [Way(said, needs, needs <= has) for said, needs in _other_ways(parts, device, width)]
    return Preflight(name, device, dtype, parts, _needed(parts, width), has, tuple(ways))


def check_memory(found: Preflight | None) -> None:
    """MemoryShort with one sentence if a model does not fit."""
    if found is not None and not found.fits:
        raise MemoryShort(found.sentence())


def _needed(parts: tuple[Component, ...], width: int) -> int:
    """All weights at `width` bytes each, a quantized copy of the denoiser at 8 bits beside them, and room to work."""
    return sum(part.parameters for part in parts) * width + _denoiser(parts) + WORK_BYTES


def _denoiser(parts: tuple[Component, ...]) -> int:
    return sum(part.parameters for part in parts if part.name == DENOISER)


def _other_ways(parts: tuple[Component, ...], device: Device, width: int) -> list[tuple[str, int]]:
    """Ways that need less, with their bytes: two bytes a weight, text encoders run first and freed, offload from a GPU."""
    encoders = sum(part.parameters for part in parts if part.name.startswith("text_encoder"))
    rest = sum(part.parameters for part in parts) - encoders
    copy = _denoiser(parts) + WORK_BYTES
    ways = [("in bfloat16", _needed(parts, 2))] if width > 2 else []
    if encoders:
        said = "in bfloat16 with the text encoders run first and then freed"
        ways.append((said, max(encoders * 2 + WORK_BYTES, rest * 2 + copy)))
    if device == "cuda":
        ways.append(("with model offload", max(part.parameters for part in parts) * width + copy))
        ways.append(("with sequential offload", max(part.largest_block for part in parts) * width + WORK_BYTES))
    return ways


def free_memory() -> int:
    """Bytes of memory that a process can still get: what the machine has free, or less where a container limits it."""
    free = psutil.virtual_memory().available
    limit = _container_room()
    return free if limit is None else min(free, limit)


def free_gpu_memory() -> int:
    """Bytes that are free on the first GPU."""
    import torch

    return int(torch.cuda.mem_get_info(0)[0])


def _container_room(base: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the container's own limit, its caches counted as free; None where there is no limit."""
    for limit_file, used_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = int((base / limit_file).read_text()), int((base / used_file).read_text())
            statistics = (base / limit_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue  # not this version of control groups, or the limit is "max"
        cache = re.search(rf"^{cache_key} (\d+)$", statistics, re.MULTILINE)
        return max(0, limit - used + (int(cache[1]) if cache else 0))
    return None
