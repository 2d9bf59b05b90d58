"""Clips as files: H.264 to look at, a PNG sequence to measure, a filmstrip to print. Metrics never read the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trdq_core.errors import BackendUnavailable, ShapeError, StorageError

FPS = 8.0  # frames a second: every third of the 23.8 a second that the training clips have
QUALITY = 14  # x264's constant rate factor: 0 is lossless, 18 is taken for visually lossless
CODEC = "libx264"
_CODEC_ADVICE = (
    "reinstall imageio-ffmpeg, whose program has it, or leave IMAGEIO_FFMPEG_EXE unset; PNG files are written anyway"
)


def write_mp4(file: Path, frames: np.ndarray, fps: float = FPS) -> Path:
    """Write frames (frames, height, width, 3) uint8 as H.264 in yuv420p, which every browser plays; returns `file`.

    ShapeError if a side is odd, BackendUnavailable if there is no ffmpeg with that codec, StorageError if writing fails.
    """
    check_frames(frames)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ShapeError(
            f"video {file.name}: got frames of {width}x{height} pixels; yuv420p needs even sides, crop or pad one pixel."
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(file, error) from error
    partial = file.with_name(f"{file.stem}.partial.mp4")
    try:
        _encode(partial, frames, fps)
        partial.replace(file)
    except OSError as error:
        _explain_codec(file)
        raise _storage_error(file, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return file


def _encode(file: Path, frames: np.ndarray, fps: float) -> None:
    """Feed ffmpeg; OSError if it stops, BackendUnavailable if there is none."""
    try:
        import imageio_ffmpeg  # kept out of the top, so that everything but the mp4 works without it

        writer = imageio_ffmpeg.write_frames(
            str(file),
            (frames.shape[2], frames.shape[1]),
            fps=fps,
            codec=CODEC,
            pix_fmt_in="rgb24",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-crf", str(QUALITY), "-preset", "medium", "-movflags", "+faststart"],
        )
        writer.send(None)
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailable(
            f"video: no ffmpeg was found to write {CODEC} with; pip install imageio-ffmpeg brings one."
        ) from error
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()
    if not file.is_file() or file.stat().st_size == 0:
        raise OSError("ffmpeg wrote nothing")


def _explain_codec(file: Path) -> None:
    """Raise BackendUnavailable if ffmpeg runs but lacks the codec: then the disk is not to blame."""
    import subprocess

    import imageio_ffmpeg

    program = imageio_ffmpeg.get_ffmpeg_exe()
    try:
        known = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        known = None
    if known is None or CODEC not in known.stdout:
        raise BackendUnavailable(f"video {file.name}: this ffmpeg cannot write {CODEC}; {_CODEC_ADVICE}.")


def write_png_sequence(folder: Path, frames: np.ndarray) -> list[Path]:
    """Write frames (frames, height, width, 3) uint8 as 000.png, 001.png and so on into `folder`; returns the files."""
    check_frames(frames)
    files = [folder / f"{number:03d}.png" for number in range(len(frames))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, frame in zip(files, frames, strict=True):
            Image.fromarray(frame).save(file)
    except OSError as error:
        raise _storage_error(folder, error) from error
    return files


def read_png_sequence(folder: Path) -> np.ndarray:
    """Frames (frames, height, width, 3) uint8 of a folder of PNG files, in the order of their names."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise StorageError(f"clip {folder.name}: there are no PNG files in it; sample the clip again.")
    try:
        frames = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        return np.stack(frames)
    except (OSError, ValueError) as error:
        raise StorageError(f"clip {folder.name}: its PNG files cannot be read ({error}); sample it again.") from error


def filmstrip(frames: np.ndarray, count: int = 8, gap: int = 2) -> np.ndarray:
    """`count` evenly spaced frames side by side, first and last among them, with `gap` white pixels between.

    Takes (frames, height, width, 3) uint8, returns (height, count * width + (count - 1) * gap, 3); fewer frames than
    `count` are all shown.
    """
    check_frames(frames)
    chosen: Sequence[int] = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int).tolist()
    height, width = frames.shape[1:3]
    strip = np.full((height, len(chosen) * (width + gap) - gap, 3), 255, np.uint8)
    for place, number in enumerate(chosen):
        left = place * (width + gap)
        strip[:, left : left + width] = frames[number]
    return strip


def check_frames(frames: np.ndarray) -> None:
    """ShapeError unless `frames` is (frames, height, width, 3) uint8 with at least one frame."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ShapeError(
            f"clip: got an array of {frames.shape} {frames.dtype}; (frames, height, width, 3) uint8 is needed."
        )


def _storage_error(file: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error).strip().splitlines()[0][:200]
    return StorageError(
        f"clip {file.name}: could not be written ({reason}); free some disk space or choose another folder."
    )
