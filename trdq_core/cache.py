"""Where caches and data go: the person's own cache folder, or one in the temporary folder where that cannot be written."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """$XDG_CACHE_HOME, else ~/.cache; where neither can be written, such as without a home, a private temporary folder."""
    wished = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(wished) if wished else Path.home() / ".cache"
    except RuntimeError:  # there is no home at all
        return _temporary()
    return folder if _can_be_written(folder) else _temporary()


def data_folder() -> Path:
    """Where runs, calibrations and switched sets live: TRDQ_DATA_DIR, else `trdq-studio` in the user's cache folder."""
    base = os.environ.get("TRDQ_DATA_DIR")
    return Path(base) if base else cache_root() / "trdq-studio"


@functools.cache
def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@functools.cache
def _temporary() -> Path:
    """A folder that only this user can write, the same for the next start; a fresh one if somebody else took its name.

    Compiled kernels are loaded from it, so nobody else may put files there.
    """
    folder = Path(tempfile.gettempdir()) / f"trdq-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="trdq-"))
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if stat.S_ISDIR(found.st_mode) and own and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="trdq-"))
