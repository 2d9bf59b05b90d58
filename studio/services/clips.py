"""Clips of stored runs: a sheet with every exact frame, files to keep, the numbers of each frame, and what a stop left."""

from __future__ import annotations

import math
import os
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from studio.services import pictures
from studio.services.stored import StoredRun, inside
from trdq_core.errors import StorageError
from trdq_core.models import kind_of

SHEET_COLUMNS = 8  # frames side by side on a sheet
REFERENCE, NOISE_FLOOR = "fp", "fp-again"  # the recipes that a comparison adds by itself
NO_VIDEO = "there is no mp4 of every clip"


class ClipShape(NamedTuple):
    """What every clip of a run has in common."""

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One recipe's clip of one prompt. Curves have a value a frame; those of the reference are None."""

    recipe: str
    facts: dict[str, Any]  # the recipe's row of the report
    video: Path | None
    sheet: Path  # PNG, SHEET_COLUMNS frames in a row, without gaps
    archive: Path  # zip of the PNG frames
    psnr: list[float | None] | None  # dB; None where the frame equals the reference's
    ssim: list[float] | None
    temporal_error: float | None
    motion_ratio: float | None
    worst_frame: int | None


class Partial(NamedTuple):
    """The last filmstrip of a recipe that a stopped run did not finish."""

    recipe: str
    image: Path
    said: str


def shape_of(run: StoredRun) -> ClipShape | None:
    """What the clips of a run have in common; nothing if it made pictures."""
    found = run.report.get("clip")
    try:
        shape = ClipShape(*(int(found[name]) for name in ("frames", "height", "width")), float(found["fps"]))
    except (TypeError, KeyError, ValueError):
        return None
    return shape if min(shape) > 0 else None


def makes_clips(run: StoredRun) -> bool:
    """Whether the run is one of clips, though it may have finished none."""
    told = isinstance(run.report.get("clip"), dict)
    return told or (run.spec is not None and kind_of(run.spec.model) == "video")


def clips_of(run: StoredRun, prompt: int) -> list[Clip]:
    """Every recipe's clip of a prompt, in the order of the report; those that are missing or damaged are left out."""
    shape = shape_of(run)
    if shape is None:
        return []
    found = (_clip(run, shape, name, facts, prompt) for name, facts in run.recipes.items())
    return [clip for clip in found if clip is not None]


def why_no_video(run: StoredRun) -> str:
    """What the run said about the mp4 files that it did not write."""
    said = (str(event.get("text")) for event in run.events() if event.get("kind") == "warning")
    return next((text for text in said if "mp4" in text or "video" in text), NO_VIDEO)


def partials(run: StoredRun) -> list[Partial]:
    """The last filmstrip of the first prompt of each recipe that the report lacks, in the order of sampling."""
    left: dict[str, Partial] = {}
    if not makes_clips(run):
        return []
    asked = {REFERENCE, *(recipe.name for recipe in run.spec.recipes)} if run.spec else set()
    for event in run.events():
        recipe, path = str(event.get("recipe")), inside(run.folder, str(event.get("image")))
        known = (
            event.get("kind") in ("preview", "clip")
            and event.get("prompt", 0) == 0
            and recipe in asked - set(run.recipes)
        )
        if known and path is not None and path.is_file():
            preview = event["kind"] == "preview"
            said = (
                f"stopped after step {event.get('step')} of {event.get('steps')}"
                if preview
                else "sampled, not measured"
            )
            left[recipe] = Partial(recipe, path, said)
    return list(left.values())


def strip_of(run: StoredRun, recipe: str, prompt: int) -> Path | None:
    """The filmstrip of one clip; nothing if it is not there."""
    relative = _of_prompt(run.recipes.get(recipe, {}), "images", prompt)
    path = inside(run.folder, relative) if isinstance(relative, str) else None
    return path if path is not None and path.is_file() else None


def psnr_of_pair(run: StoredRun, left: str, right: str, prompt: int) -> float | None:
    """PSNR in dB of two recipes' pictures, or the mean over the frames of their clips; infinite if all are equal."""
    if makes_clips(run):
        pairs = list(zip(frames_of(run, left, prompt), frames_of(run, right, prompt), strict=False))
    else:
        both = run.picture(left, prompt), run.picture(right, prompt)
        pairs = [both] if both[0] is not None and both[1] is not None else []
    values = [pictures.psnr(one, other) for one, other in pairs if one.size == other.size]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf if values else None


def frames_of(run: StoredRun, recipe: str, prompt: int) -> list[Image.Image]:
    """The exact frames of one clip in order; none if one is missing or damaged."""
    files = _frame_files(run, run.recipes.get(recipe, {}), prompt)
    frames = [pictures.load(file) for file in files]
    return [frame for frame in frames if frame is not None] if all(frames) else []


def _clip(run: StoredRun, shape: ClipShape, name: str, facts: dict[str, Any], prompt: int) -> Clip | None:
    files = _frame_files(run, facts, prompt)
    if len(files) != shape.frames:
        return None
    stem, folder = f"{name}_{prompt:03d}", _folder_of(run)
    sheet = _made(folder / f"{stem}.png", lambda file: _write_sheet(file, files, shape))
    if sheet is None:
        return None
    archive = _made(folder / f"{stem}.zip", lambda file: _write_archive(file, files, stem))
    video = _of_prompt(facts, "videos", prompt)
    path = inside(run.folder, video) if isinstance(video, str) else None
    ratio, worst = _of_prompt(facts, "motion_ratio", prompt), _of_prompt(facts, "worst_frame", prompt)
    error = _of_prompt(facts, "temporal_error", prompt)
    return Clip(
        recipe=name, facts=facts, video=path if path is not None and path.is_file() else None, sheet=sheet,
        archive=archive or sheet, psnr=_curve(facts, "frame_psnr", prompt, shape), temporal_error=_number(error),
        ssim=_curve(facts, "frame_ssim", prompt, shape), motion_ratio=_number(ratio),
        worst_frame=worst if isinstance(worst, int) and 0 <= worst < shape.frames else None,
    )  # fmt: skip


def _frame_files(run: StoredRun, facts: dict[str, Any], prompt: int) -> list[Path]:
    relative = _of_prompt(facts, "frames", prompt)
    folder = inside(run.folder, relative) if isinstance(relative, str) else None
    return sorted(file for file in folder.glob("*.png") if not file.is_symlink()) if folder is not None else []


def _of_prompt(facts: dict[str, Any], name: str, prompt: int) -> Any:
    values = facts.get(name)
    return values[prompt] if isinstance(values, list) and 0 <= prompt < len(values) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _curve(facts: dict[str, Any], name: str, prompt: int, shape: ClipShape) -> Any:
    values = _of_prompt(facts, name, prompt)
    if not isinstance(values, list) or len(values) != shape.frames:
        return None
    return [_number(value) for value in values]


@cache
def _files() -> tempfile.TemporaryDirectory[str]:
    """Where sheets and archives wait to be fetched; removed when the studio ends."""
    return tempfile.TemporaryDirectory(prefix="trdq-clips-", ignore_cleanup_errors=True)


def _folder_of(run: StoredRun) -> Path:
    return Path(_files().name) / run.id


def _made(file: Path, write: Callable[[Path], None]) -> Path | None:
    """`file`, written by `write` if it is not there yet; nothing if what it is made of is damaged."""
    if file.is_file():
        return file
    partial = file.with_name(f"{uuid.uuid4().hex}{file.suffix}")
    try:
        file.parent.mkdir(exist_ok=True)
        write(partial)
        os.replace(partial, file)
    except ValueError:
        return None
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"clip {file.stem}: its frames could not be gathered ({error.strerror or error})."
        ) from error
    return file


def _write_sheet(file: Path, frames: Sequence[Path], shape: ClipShape) -> None:
    """One PNG of all frames; ValueError if one is damaged or of another size."""
    rows = -(-shape.frames // SHEET_COLUMNS)
    sheet = Image.new("RGB", (min(SHEET_COLUMNS, shape.frames) * shape.width, rows * shape.height), "white")
    for index, path in enumerate(frames):
        frame = pictures.load(path)
        if frame is None or frame.size != (shape.width, shape.height):
            raise ValueError(path.name)
        sheet.paste(frame, (index % SHEET_COLUMNS * shape.width, index // SHEET_COLUMNS * shape.height))
    sheet.save(file)


def _write_archive(file: Path, frames: Sequence[Path], stem: str) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as bundle:  # PNG files do not get smaller
        for path in frames:
            bundle.write(path, f"{stem}/{path.name}")
