"""Removing what runs leave in the data folder and nothing reads any more: switched sets and learnt rounding, by age."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import NamedTuple

from trdq_core.errors import RecipeError, StorageError
from trdq_core.folders import data_folder

KINDS = ("sets", "reconstructions")  # made again by the run that needs them; runs, calibrations and recipes stay
DAY = 86_400.0
MOST_DAYS = 36_500


class Leftover(NamedTuple):
    """A file or folder that may go: its place, its bytes, and the days since anything in it was changed."""

    path: Path
    nbytes: int
    days: float


def leftovers(days: float) -> list[Leftover]:
    """What nothing has changed for `days` days, oldest first. RecipeError for a number of days that is none."""
    if not 0 <= days <= MOST_DAYS:
        raise RecipeError(f"--older-than: got {days:g} days; allowed is 0 to {MOST_DAYS:,}.")
    found, now = [], time.time()
    for kind in KINDS:
        folder = data_folder() / kind
        for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
            inside = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
            stats = [file.lstat() for file in inside]
            age = (now - max(stat.st_mtime for stat in stats)) / DAY
            if age >= days:
                found.append(Leftover(path, sum(stat.st_size for stat in stats), max(age, 0.0)))
    return sorted(found, key=lambda one: -one.days)


def clean(days: float, *, dry_run: bool = False) -> list[Leftover]:
    """Remove the leftovers older than `days`, or only list them; StorageError names the first that cannot be removed.

    A run at work has its sets mapped: where files can go while they are mapped it is not disturbed.
    """
    found = leftovers(days)
    for one in () if dry_run else found:
        try:
            if one.path.is_dir() and not one.path.is_symlink():
                shutil.rmtree(one.path)
            else:
                one.path.unlink()
        except OSError as error:
            raise StorageError(
                f"{one.path.name}: could not be removed ({error.strerror or error}); what came before it is gone."
            ) from error
    return found
