"""What a model needs in memory and what there is, known from file headers before a single tensor is read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from trdq_core.adapters.precision import BYTES, choose_dtype
from trdq_core.errors import MemoryShort, ModelError
from trdq_core.specs import DEFAULT_LOADING, OFFLOADS, Loading, Offload, Precision

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
    """A way of loading, by its flags, and what it needs."""

    flags: str
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
        ways = [f"{gigabytes(way.needs)} with {way.flags}{'' if way.fits else ' (too much)'}" for way in self.ways]
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


def preflight(
    name: str, folder: Path | None, device: Device, loading: Loading = DEFAULT_LOADING
) -> Preflight | None:  # fmt: skip
    """What the model in `folder` needs on `device` and what that has; None for the built-in one of random weights."""
    if folder is None:
        return None
    parts = components_of(folder)
    dtype = choose_dtype(folder, loading.dtype, device)
    has = free_gpu_memory() if device == "cuda" else free_memory()
    ways = [Way(_flags(one), needs, needs <= has) for one, needs in _other_ways(parts, folder, device, loading)]
    return Preflight(name, device, dtype, parts, _needed(parts, BYTES[dtype], loading.offload), has, tuple(ways))


def check_memory(found: Preflight | None) -> None:
    """MemoryShort with one sentence if a model does not fit."""
    if found is not None and not found.fits:
        raise MemoryShort(found.sentence())


def _needed(parts: tuple[Component, ...], width: int, offload: Offload) -> int:
    """The weights on the device at `width` bytes each, a quantized copy of the denoiser at 8 bits, and room to work.

    With offload that is the denoiser and the largest other part, or that part's largest block.
    """
    denoiser = sum(part.parameters for part in parts if part.name == DENOISER)
    others = [part for part in parts if part.name != DENOISER]
    if offload == "sequential":
        beside = max((part.largest_block for part in others), default=0)
    elif offload == "model":
        beside = max((part.parameters for part in others), default=0)
    else:
        beside = sum(part.parameters for part in others)
    return (denoiser + beside) * width + denoiser + WORK_BYTES


def _other_ways(
    parts: tuple[Component, ...], folder: Path, device: Device, loading: Loading
) -> list[tuple[Loading, int]]:  # fmt: skip
    """Ways of loading that need less, with their bytes, from the least change to the most."""
    precisions: list[Precision] = [loading.dtype, *(("bf16",) if loading.dtype != "bf16" else ())]
    offloads = OFFLOADS[OFFLOADS.index(loading.offload) :] if device == "cuda" else (loading.offload,)
    found, least = [], _needed(parts, BYTES[choose_dtype(folder, loading.dtype, device)], loading.offload)
    for one in (Loading(dtype, offload) for dtype in precisions for offload in offloads):
        needs = _needed(parts, BYTES[choose_dtype(folder, one.dtype, device)], one.offload)
        if needs < least:
            least = needs
            found.append((one, needs))
    return found


def _flags(loading: Loading) -> str:
    """The flags that ask for a way of loading."""
    dtype = [f"--dtype {loading.dtype}"] if loading.dtype != "auto" else []
    offload = [f"--offload {loading.offload}"] if loading.offload != "none" else []
    return " ".join(dtype + offload)


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
