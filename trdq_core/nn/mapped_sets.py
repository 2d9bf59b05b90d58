"""Stored tensors of safetensors files as views of the memory-mapped file, and a reader that brings pages in beforehand."""

from __future__ import annotations

import json
import mmap
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trdq_core.errors import CalibrationError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor lies: which file, and from which byte to which."""

    file: int
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class MappedFiles:
    """The tensors of some safetensors files without a copy: what is not looked at takes no memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._maps: list[mmap.mmap] = []
        self.places: dict[str, Place] = {}
        for index, file in enumerate(files):
            try:
                self._open(index, file)
            except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
                raise CalibrationError(
                    f"{file.name}: the switched sets cannot be read ({error}); convert again."
                ) from error

    def tensor(self, name: str) -> Tensor:
        """A view of the file. Nothing is read until somebody looks; a change would stay in this process."""
        place = self.places[name]
        count = (place.end - place.begin) // place.dtype.itemsize
        if count == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(self._maps[place.file], dtype=place.dtype, count=count, offset=place.begin).view(
            place.shape
        )

    def touch(self, names: Iterable[str]) -> None:
        """Bring the pages of some tensors into memory. numpy lets go of the interpreter meanwhile."""
        for file, begin, end in self._ranges(names):
            with suppress(ValueError, OSError):  # a hint; not every file system takes it
                self._maps[file].madvise(mmap.MADV_WILLNEED, begin, end - begin)
            np.frombuffer(self._maps[file], dtype=np.uint8, count=end - begin, offset=begin)[:: mmap.PAGESIZE].max()

    def release(self, names: Iterable[str]) -> None:
        """Let the pages of some tensors go. They are clean, so they come back from the file if somebody looks again."""
        for file, begin, end in self._ranges(names):
            with suppress(ValueError, OSError):
                self._maps[file].madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _open(self, index: int, file: Path) -> None:
        with file.open("rb") as handle:
            # Private and writable, since torch warns of memory that it may not write to; nothing ever does.
            self._maps.append(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY))
        mapped = self._maps[index]
        (size,) = struct.unpack("<Q", mapped[:8])
        if size > len(mapped) - 8:
            raise ValueError("it ends within its header")
        header = json.loads(mapped[8 : 8 + size])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            if end > len(mapped):
                raise ValueError("it ends within a tensor")
            self.places[name] = Place(index, begin, end, _DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def _ranges(self, names: Iterable[str]) -> list[tuple[int, int, int]]:
        """File, begin and end of whole pages, neighbours joined."""
        joined: list[tuple[int, int, int]] = []
        for place in sorted(self.places[name][:3] for name in names):
            file, begin, end = place
            begin -= begin % mmap.PAGESIZE
            if joined and joined[-1][0] == file and begin <= joined[-1][2] + mmap.PAGESIZE:
                joined[-1] = (file, joined[-1][1], max(end, joined[-1][2]))
            else:
                joined.append((file, begin, end))
        return joined


class Reader:
    """Does work on mapped files in a thread of its own, one piece at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Start some work, after what is under way."""
        self.wait()
        self._thread = threading.Thread(target=work, name="trdq-reader", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
