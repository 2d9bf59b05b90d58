"""Stored tensors of safetensors files as views of the memory-mapped file, and a reader that brings pages in beforehand."""

from __future__ import annotations

import json
import logging
import mmap
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
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


Range = tuple[int, int, int]  # file, first byte, last byte + 1
Work = tuple[Callable[[], None], threading.Event]


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

    def touch(self, ranges: Iterable[Range]) -> None:
        """Bring some pages into memory. numpy lets go of the interpreter meanwhile."""
        for file, begin, end in ranges:
            with suppress(ValueError, OSError):  # a hint; not every file system takes it
                self._maps[file].madvise(mmap.MADV_WILLNEED, begin, end - begin)
            np.frombuffer(self._maps[file], dtype=np.uint8, count=end - begin, offset=begin)[:: mmap.PAGESIZE].max()

    def release(self, ranges: Iterable[Range]) -> None:
        """Let some pages go. They are clean, so they come back from the file if somebody looks again."""
        for file, begin, end in ranges:
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

    def ranges(self, names: Iterable[str]) -> list[Range]:
        """Where some tensors lie, in whole pages, neighbours joined."""
        joined: list[Range] = []
        for place in sorted(self.places[name][:3] for name in names):
            file, begin, end = place
            begin -= begin % mmap.PAGESIZE
            if joined and joined[-1][0] == file and begin <= joined[-1][2] + mmap.PAGESIZE:
                joined[-1] = (file, joined[-1][1], max(end, joined[-1][2]))
            else:
                joined.append((file, begin, end))
        return joined


class Reader:
    """Does work in a thread of its own, one piece after the other. The thread ends when the reader is let go."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._done = threading.Event()
        self._done.set()
        threading.Thread(target=_serve, args=(self._queue,), name="trdq-reader", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def begin(self, work: Callable[[], None]) -> None:
        """Start some work after what is under way; does not wait for the thread to wake."""
        self._done = threading.Event()
        self._queue.put((work, self._done))

    def wait(self) -> None:
        """Until nothing is under way."""
        self._done.wait()


def _serve(queue: SimpleQueue[Work | None]) -> None:
    while (item := queue.get()) is not None:
        work, done = item
        try:
            work()
        except Exception:  # reading ahead is a help, not a duty: whoever needs the set meets the error itself
            logging.getLogger(__name__).debug("reading ahead failed", exc_info=True)
        finally:
            done.set()
        del work, done, item  # or they would stay until the next piece
