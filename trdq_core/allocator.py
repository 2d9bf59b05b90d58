"""Memory that is free but that the C library keeps: glibc hands it back only where it is asked to."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any


def release_free_memory() -> None:
    """Give freed memory back to the system; does nothing where the C library is not glibc.

    Fitting frees large temporaries between small results that stay, so the heap becomes mostly holes that count as resident.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    with suppress(OSError, AttributeError):
        return ctypes.CDLL("libc.so.6").malloc_trim
    return None
