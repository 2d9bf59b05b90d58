"""Clips written to files and read back."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from trdq_core.errors import BackendUnavailable, ShapeError, StorageError
from trdq_core.video_files import filmstrip, read_png_sequence, write_mp4, write_png_sequence


def clip(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A soft gradient that brightens frame by frame, which a codec keeps nearly as it is."""
    ramp = np.linspace(40, 160, width)[None, None, :, None] + 8 * np.arange(frames)[:, None, None, None]
    return np.broadcast_to(ramp, (frames, height, width, 3)).round().astype(np.uint8)


def test_an_mp4_holds_every_frame_as_h264_in_yuv420p(tmp_path: Path) -> None:
    file = write_mp4(tmp_path / "new" / "clip.mp4", clip(), fps=8)
    reader = imageio_ffmpeg.read_frames(str(file))
    facts = next(reader)
    frames = [np.frombuffer(data, np.uint8).reshape(32, 48, 3) for data in reader]
    assert facts["codec"] == "h264" and facts["pix_fmt"].startswith("yuv420p")
    assert facts["size"] == (48, 32) and facts["fps"] == 8
    assert len(frames) == 6
    assert np.abs(np.stack(frames).astype(int) - clip()).mean() < 3
    assert [path.name for path in file.parent.iterdir()] == ["clip.mp4"]


def test_small_sizes_are_not_blown_up(tmp_path: Path) -> None:
    file = write_mp4(tmp_path / "clip.mp4", clip(height=18, width=22))
    assert next(imageio_ffmpeg.read_frames(str(file)))["size"] == (22, 18)


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47)])
def test_odd_sides_are_refused_in_one_sentence(tmp_path: Path, height: int, width: int) -> None:
    with pytest.raises(ShapeError, match=f"{width}x{height} pixels; yuv420p needs even sides"):
        write_mp4(tmp_path / "clip.mp4", clip(height=height, width=width))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="stands a shell script in for ffmpeg")
def test_a_missing_codec_is_named_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\ncase "$*" in *-encoders*) echo " V..... mpeg4";; *-version*) echo "ffmpeg version 9";; '
                       '*) echo "Unknown encoder" >&2; exit 1;; esac\n')  # fmt: skip
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(BackendUnavailable, match="cannot write libx264; .*PNG files") as caught:
        write_mp4(tmp_path / "out" / "clip.mp4", np.repeat(clip(), 40, axis=0))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_without_ffmpeg_it_is_said_what_brings_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(BackendUnavailable, match="pip install imageio-ffmpeg"):
        write_mp4(tmp_path / "clip.mp4", clip())


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be written"):
        write_mp4(tmp_path / "file" / "clip.mp4", clip())
    with pytest.raises(StorageError, match="could not be written"):
        write_png_sequence(tmp_path / "file", clip())


def test_png_sequences_come_back_exactly(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (11, 9, 7, 3), dtype=np.uint8)
    files = write_png_sequence(tmp_path / "clip", noise)
    assert [file.name for file in files][:2] == ["000.png", "001.png"] and len(files) == 11
    assert np.array_equal(read_png_sequence(tmp_path / "clip"), noise)
    with pytest.raises(StorageError, match="there are no PNG files"):
        read_png_sequence(tmp_path)


def test_damaged_png_files_get_one_sentence(tmp_path: Path) -> None:
    write_png_sequence(tmp_path, clip(3))
    (tmp_path / "001.png").write_bytes(b"no picture")
    with pytest.raises(StorageError, match="cannot be read"):
        read_png_sequence(tmp_path)


def test_a_filmstrip_shows_first_and_last_with_gaps() -> None:
    frames = clip(16, 4, 4)
    strip = filmstrip(frames, count=4, gap=2)
    assert strip.shape == (4, 4 * 4 + 3 * 2, 3)
    assert np.array_equal(strip[:, :4], frames[0]) and np.array_equal(strip[:, -4:], frames[15])
    assert (strip[:, 4:6] == 255).all()
    assert np.array_equal(strip[:, 6:10], frames[5])
    assert filmstrip(frames[:3], count=8, gap=0).shape == (4, 12, 3)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"\(frames, height, width, 3\) uint8 is needed"):
        filmstrip(wrong)
