"""Memory that is freed: kept by the C library while many large temporaries follow each other, handed back afterwards."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt
_KEEP = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1}
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}  # where glibc's own adjustment ends up
_lock, _keepers = threading.Lock(), 0


def release_free_memory() -> None:
    """Give freed memory back to the system; does nothing where the C library is not glibc.

    Fitting frees large temporaries between small results that stay, so the heap becomes mostly holes that count as resident.
    """
    library = _libc()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let temporaries of any size be made of memory that was freed before; does nothing where the C library is not glibc.

    By itself glibc maps large ones anew each time, and the system zeroes their pages: nearly half the time of a fit.
    """
    global _keepers
    with _lock:
        _keepers += 1
        _set(_KEEP)
    try:
        yield
    finally:
        with _lock:
            _keepers -= 1
            if not _keepers:
                _set(_USUAL)
                release_free_memory()


def _set(values: dict[int, int]) -> None:
    library = _libc()
    for parameter, value in values.items() if library is not None else ():
        library.mallopt(parameter, value)


@cache
def _libc() -> Any:
    """The C library if it is glibc, else None."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.malloc_trim, library.mallopt  # noqa: B018  # what other C libraries lack
        return library
    return None
