"""Archives that a browser downloads: written when asked for, of folders that the studio itself chose."""

from __future__ import annotations

import tempfile
import uuid
import zipfile
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

from trdq_core.errors import StorageError

LARGEST = 2 * 10**9  # bytes; more is copied twice on its way to the browser, and is better fetched by other means
# Weights and pictures do not get smaller: packing them again only takes time.
PACKED_ALREADY = (".safetensors", ".png", ".mp4", ".npz")


@cache
def _archives() -> tempfile.TemporaryDirectory[str]:
    """Where archives wait to be fetched; removed when the studio ends."""
    return tempfile.TemporaryDirectory(prefix="trdq-archives-", ignore_cleanup_errors=True)


def pack(name: str, inner: str, folders: Sequence[Path], place: str, leave_out: Collection[Path] = ()) -> Path:
    """The zip `name` of all files in `folders`, under the folder `inner` in it, without those in the folders `leave_out`.

    StorageError if it would hold more than LARGEST bytes, with `place` saying where to find them instead, or cannot be
    written.
    """
    files = [pair for folder in folders for pair in _files(folder, leave_out)]
    size = sum(path.stat().st_size for path, _ in files)
    if size > LARGEST:
        raise StorageError(
            f"download: {size / 1e9:.1f} GB are more than the {LARGEST / 1e9:.0f} GB that a page hands out; {place}."
        )
    target = Path(_archives().name) / f"{name}.zip"
    partial = target.with_name(f"{name}-{uuid.uuid4().hex}.tmp")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as bundle:
            for path, relative in files:
                kind = zipfile.ZIP_STORED if path.suffix in PACKED_ALREADY else zipfile.ZIP_DEFLATED
                bundle.write(path, Path(inner) / relative, compress_type=kind)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"download: the archive of {name} could not be written ({error.strerror}).") from error
    return target


def _files(folder: Path, leave_out: Collection[Path]) -> Iterator[tuple[Path, Path]]:
    """Every plain file in a folder and its place there; links are not followed."""
    for path in sorted(folder.rglob("*")):
        kept = not any(path.is_relative_to(one) for one in leave_out)
        if kept and path.is_file() and not path.is_symlink():
            yield path, path.relative_to(folder)
