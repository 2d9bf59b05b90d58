"""Fetching a model of the hub: its size is asked and the free disk looked at first, and every byte is told.

Files that arrived whole are not fetched again after a stop.
"""

from __future__ import annotations

import datetime
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trdq_core.errors import Cancelled, ModelError, StorageError
from trdq_core.events import OnEvent, ignore
from trdq_core.hub.files import read_index, wanted, wanted_files
from trdq_core.hub.known import HubModel
from trdq_core.hub.store import RECORD, Downloaded, folder_of, free_disk, models_folder, read_record
from trdq_core.hub.words import in_words

MIB = 1 << 20
SPARE_DISK = 1 << 30  # bytes that stay free beside the model
REPORT_SECONDS = 0.5


class Offer(NamedTuple):
    """What fetching a model would take. `pinned`: the commit is that of the list, not the newest."""

    repo: str
    revision: str
    pinned: bool
    files: tuple[tuple[str, int], ...]  # path in the repository, bytes
    bytes: int
    missing_bytes: int
    free_bytes: int


def look_up(model: HubModel, *, anonymous: bool = False) -> Offer:
    """Ask the hub what fetching a model would take; ModelError if it cannot be had or would not be loaded.

    `anonymous`: without this machine's token, as for an id that a visitor typed.
    """
    import huggingface_hub

    token = False if anonymous else None
    with in_words(model):
        info = huggingface_hub.HfApi().model_info(model.repo, revision=model.revision, files_metadata=True, token=token)
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        if "model_index.json" not in sizes:
            raise ModelError(f"model {model.repo}: it has no model_index.json, so it is no diffusers pipeline.")
        index_file = _fetch(model.repo, "model_index.json", info.sha, token)
    files = tuple((name, sizes[name]) for name in wanted_files(model.repo, read_index(model.repo, index_file), sizes))
    folder = folder_of(model.repo)
    missing = sum(size for name, size in files if not _is_whole(folder / name, size))
    total = sum(size for _, size in files)
    return Offer(model.repo, info.sha, model.revision is not None, files, total, missing, free_disk())


def download(
    name: str,
    *,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
    anonymous: bool = False,
) -> Downloaded:
    """Fetch a model of the closed list by its name, or any by its id; what is here already is not fetched again.

    Raises ModelError or StorageError with one sentence; Cancelled where the person stopped it, and whole files stay.
    """
    model = wanted(name)
    folder = folder_of(model.repo)
    on_event(_stage(f"Asking the hub for {model.repo}"))
    offer = look_up(model, anonymous=anonymous)
    check_disk(offer)
    _forget_other_revision(folder, offer.revision)
    newest = "" if offer.pinned else " (its newest revision; no other was asked for)"
    size = f"{offer.bytes / 1e9:.2f} GB, {offer.missing_bytes / 1e9:.2f} GB to fetch"
    said = f"{model.repo} at {offer.revision[:8]}{newest}, {size}"
    on_event(_stage(f"Downloading {said}"))
    counter = _Counter(offer, on_event, cancelled or (lambda: False))
    token = False if anonymous else None
    with in_words(model):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".revision").write_text(offer.revision, encoding="utf-8")
        for file, size in offer.files:
            counter.begin(file)
            path = _fetch(offer.repo, file, offer.revision, token, folder=folder, bar=counter.bar())
            if not _is_whole(path, size):
                raise ModelError(f"model {offer.repo}: {file} did not arrive whole; download it again.")
            counter.finish(size)
        about = {
            "repo": offer.repo, "revision": offer.revision, "pinned": offer.pinned, "bytes": offer.bytes,
            "created": datetime.datetime.now().isoformat(timespec="seconds"),
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(about, indent=1), encoding="utf-8")
    record = read_record(folder)
    assert record is not None  # just written
    on_event({"kind": "done", "text": f"{model.name} is on this machine, revision {offer.revision[:8]}."})
    return record


def check_disk(offer: Offer) -> None:
    """StorageError if what is missing does not fit on the disk with a gigabyte to spare."""
    if offer.missing_bytes + SPARE_DISK > offer.free_bytes:
        raise StorageError(
            f"model {offer.repo}: {offer.missing_bytes / 1e9:.1f} GB are to be fetched and {offer.free_bytes / 1e9:.1f} GB are "
            "free, of which one stays so; free some disk space, or set TRDQ_DATA_DIR to a larger disk."
        )


class _Counter:
    """Bytes that arrived, reported now and then; stops the download where the person cancels."""

    def __init__(self, offer: Offer, on_event: OnEvent, cancelled: Callable[[], bool]) -> None:
        self._total, self._on_event, self._cancelled = offer.bytes, on_event, cancelled
        self._whole, self._part, self._file = 0, 0, ""
        self._resumed = offer.bytes - offer.missing_bytes
        self._started, self._said = time.monotonic(), 0.0

    def begin(self, file: str) -> None:
        """A file is about to be fetched."""
        self._file, self._part = file, 0
        self._check()

    def finish(self, size: int) -> None:
        """A file is there whole, fetched now or before."""
        self._whole, self._part = self._whole + size, 0
        self._report(always=True)

    def arrived(self, count: int) -> None:
        """Some bytes arrived."""
        self._part += count
        self._check()
        self._report()

    def bar(self) -> type:
        """A progress bar for the hub's client that draws nothing and counts here."""
        from tqdm import tqdm

        counter = self

        class Bar(tqdm):
            """Counts, and shows nothing."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*arguments, **{**options, "disable": True})

            def update(self, n: float | None = 1) -> None:
                """Bytes that arrived."""
                counter.arrived(int(n or 0))

        return Bar

    def _check(self) -> None:
        if self._cancelled():
            raise Cancelled("Cancelled during the download; the files that arrived whole are kept.")

    def _report(self, always: bool = False) -> None:
        now = time.monotonic()
        if not always and now - self._said < REPORT_SECONDS:
            return
        self._said = now
        done = min(self._whole + self._part, self._total)
        fetched = done - self._resumed
        left = (now - self._started) / fetched * (self._total - done) if fetched > 0 else None
        self._on_event(
            {
                "kind": "progress", "stage": "download", "done": done // MIB, "total": self._total // MIB, "recipe": None,
                "eta_seconds": None if left is None else round(left, 1), "detail": f"{self._file}, in MiB",
            }
        )  # fmt: skip


def _stage(label: str) -> dict[str, Any]:
    return {"kind": "stage", "stage": "download", "label": label, "recipe": None}


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _forget_other_revision(folder: Path, revision: str) -> None:
    """Remove what was fetched of another commit: a folder holds files of one."""
    try:
        before = (folder / ".revision").read_text(encoding="utf-8")
    except OSError:
        return
    if before != revision:
        shutil.rmtree(folder)


def _fetch(
    repo: str, file: str, revision: str, token: bool | None, folder: Path | None = None, bar: type | None = None
) -> Path:
    """One file, in the hub's own cache or, whole, under `folder`."""
    import huggingface_hub

    where: dict[str, Any] = {"local_dir": folder} if folder else {"cache_dir": models_folder() / ".cache"}
    return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, token=token, tqdm_class=bar, **where))
