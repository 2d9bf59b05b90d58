"""What a run leaves to look at: one PNG for a picture; for a clip its frames as PNG, an mp4 and a filmstrip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trdq_core.errors import BackendUnavailable, ShapeError, StorageError
from trdq_core.folders import RunFolder
from trdq_core.sampling import ClipShape
from trdq_core.video_files import FPS, filmstrip, read_png_sequence, write_mp4, write_png_sequence


class Output(NamedTuple):
    """Where one picture or clip lies in its run folder. The picture of a clip is a filmstrip."""

    image: str
    frames: str | None = None  # a folder of exact PNG frames; None for a picture
    video: str | None = None  # None for a picture, and where the mp4 could not be written


class OutputWriter:
    """Saves what one run samples. Where mp4 files cannot be written it says so once, and the run goes on without them."""

    def __init__(self, folder: RunFolder, clip: ClipShape | None) -> None:
        self._folder = folder
        self.clip = clip  # what the model says of its clips, then what they are
        self._videos = True

    def save(self, recipe: str, index: int, output: np.ndarray) -> Output:
        """Save a picture (height, width, 3) or a clip (frames, height, width, 3) uint8 and tell of it."""
        name = f"{recipe}_{index:03d}"
        if output.ndim == 3:
            saved = Output(self._folder.save_picture(f"images/{name}.png", output))
            self._folder.emit({"kind": "image", "recipe": recipe, "prompt": index, "image": saved.image})
            return saved
        self.clip = ClipShape(*output.shape[:3], self.clip.fps if self.clip is not None else FPS)
        frames = f"frames/{name}"
        write_png_sequence(self._folder.path / frames, output)
        image = self._folder.save_picture(f"images/{name}.png", filmstrip(output))
        saved = Output(image, frames, self._video(f"videos/{name}.mp4", output))
        places = {"video": saved.video, "frames": saved.frames, "image": saved.image}
        self._folder.emit({"kind": "clip", "recipe": recipe, "prompt": index, **places})
        return saved

    def preview(self, recipe: str, step: int, steps: int, output: np.ndarray) -> None:
        """Save a look at the first prompt from the middle of sampling, of a clip its filmstrip, and tell of it."""
        image = f"previews/{recipe}_{step:03d}.jpg"
        self._folder.save_picture(image, output if output.ndim == 3 else filmstrip(output))
        place = {"step": step + 1, "steps": steps, "image": image}
        self._folder.emit({"kind": "preview", "recipe": recipe, "prompt": 0, **place})

    def load(self, saved: Output) -> np.ndarray:
        """What `save` was given, bit by bit."""
        if saved.frames is not None:
            return read_png_sequence(self._folder.path / saved.frames)
        try:
            return np.asarray(Image.open(self._folder.path / saved.image))
        except OSError as error:
            raise StorageError(f"picture {saved.image}: cannot be read ({error}); start the run again.") from error

    def _video(self, name: str, clip: np.ndarray) -> str | None:
        """The mp4, None where there is none; StorageError where the disk is to blame."""
        if not self._videos:
            return None
        try:
            write_mp4(self._folder.path / name, clip, self.clip.fps if self.clip is not None else FPS)
        except (BackendUnavailable, ShapeError) as error:
            self._videos = False
            self._folder.emit(
                {"kind": "warning", "text": f"{str(error).rstrip('.')}; the run goes on without mp4 files."}
            )
            return None
        return name


def output_fields(saved: Sequence[Output]) -> dict[str, list[str | None]]:
    """The fields of a report row that say where its pictures or clips are."""
    fields: dict[str, list[str | None]] = {"images": [output.image for output in saved]}
    if any(output.frames is not None for output in saved):
        fields |= {"videos": [output.video for output in saved], "frames": [output.frames for output in saved]}
    return fields


def clip_facts(clip: ClipShape | None) -> dict[str, Any] | None:
    """`report["clip"]`: frames, height, width and fps of a model's clips, None if it makes pictures."""
    return clip._asdict() if clip is not None else None
