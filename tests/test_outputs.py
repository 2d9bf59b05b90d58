"""Pictures and clips in a run folder: what is written, told, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trdq_core import outputs
from trdq_core.errors import StorageError
from trdq_core.folders import RunFolder
from trdq_core.outputs import Output, OutputWriter, clip_facts, output_fields
from trdq_core.sampling import ClipShape
from trdq_core.specs import RunSpec


def random_clip(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def writer(folder: Path, events: list[dict[str, Any]], clip: ClipShape | None = None) -> OutputWriter:
    return OutputWriter(RunFolder(folder, RunSpec(command="sample", model="m"), events.append), clip)


def test_pictures_and_clips_are_read_back_bit_by_bit(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    made, clip = writer(tmp_path, events), random_clip(3, 16, 24)
    saved = [made.save("fp", 0, clip[0]), made.save("rtn-w8a8", 1, clip)]
    assert saved[0] == Output("images/fp_000.png")
    assert saved[1] == Output("images/rtn-w8a8_001.png", "frames/rtn-w8a8_001", "videos/rtn-w8a8_001.mp4")
    assert np.array_equal(made.load(saved[0]), clip[0]) and np.array_equal(made.load(saved[1]), clip)
    assert [event["kind"] for event in events] == ["image", "clip"]
    assert output_fields(saved[:1]) == {"images": ["images/fp_000.png"]}
    assert output_fields(saved[1:]) == {
        "images": [saved[1].image], "videos": [saved[1].video], "frames": [saved[1].frames]
    }  # fmt: skip
    (tmp_path / saved[0].image).write_bytes(b"x")
    with pytest.raises(StorageError, match="picture images/fp_000.png: cannot be read .* start the run again"):
        made.load(saved[0])


def test_what_a_model_does_not_say_of_its_clips_a_clip_shows(tmp_path: Path) -> None:
    made = writer(tmp_path, [], ClipShape(None, None, None, 24.0))
    assert clip_facts(made.clip) == {"frames": None, "height": None, "width": None, "fps": 24.0}
    made.save("fp", 0, random_clip(3, 16, 24))
    assert clip_facts(made.clip) == {"frames": 3, "height": 16, "width": 24, "fps": 24.0}
    assert clip_facts(None) is None


def test_sides_that_h264_cannot_take_leave_the_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    made, clip = writer(tmp_path, events), random_clip(2, 15, 16)
    saved = [made.save("fp", index, clip) for index in range(2)]
    assert [output.video for output in saved] == [None, None]
    assert np.array_equal(made.load(saved[1]), clip)
    (text,) = [event["text"] for event in events if event["kind"] == "warning"]
    assert "yuv420p needs even sides" in text and text.endswith("; the run goes on without mp4 files.")


def test_a_full_disk_is_no_matter_of_the_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> Path:
        raise StorageError("clip fp_000.mp4: could not be written (No space left on device); free some disk space.")

    monkeypatch.setattr(outputs, "write_mp4", full)
    with pytest.raises(StorageError, match="No space left"):
        writer(tmp_path, []).save("fp", 0, random_clip(2, 16, 16))
