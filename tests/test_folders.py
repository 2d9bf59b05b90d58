"""Run folders: written whole, listed newest first, and one sentence when the disk is full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trdq_core import folders
from trdq_core.errors import StorageError
from trdq_core.events import Event
from trdq_core.specs import RunSpec

SPEC = RunSpec(command="sample", model="pocket-image", prompts=("owl",))


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of this test's own."""
    monkeypatch.setenv("TRDQ_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def run_of(name: str, last: str | None) -> folders.RunFolder:
    """A run folder whose log ends with an event of kind `last`."""
    run = folders.RunFolder(folders.data_folder() / "runs" / name, SPEC)
    if last is not None:
        run.emit({"kind": last})
    return run


def test_the_data_folder_follows_the_environment(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folders.data_folder() == data
    monkeypatch.delenv("TRDQ_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.data_folder() == tmp_path / "trdq-studio"
    first, second = folders.new_run_folder("sample"), folders.new_run_folder("sample")
    assert first != second, "two runs of one second have folders of their own"
    assert not first.exists(), "only the run makes it"


def test_a_run_writes_its_spec_events_and_pictures() -> None:
    told: list[Event] = []
    run = folders.RunFolder(folders.new_run_folder("sample"), SPEC, told.append)
    assert RunSpec.from_json((run.path / "spec.json").read_text()) == SPEC
    run.emit({"kind": "warning", "text": "x"})
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert lines == told
    assert lines[0]["time"] >= 0
    assert run.save_picture("images/a.png", np.zeros((4, 4, 3), np.uint8)) == "images/a.png"
    assert (run.path / "images" / "a.png").exists()
    run.write_report({"recipes": {}})
    assert json.loads((run.path / "report.json").read_text()) == {"recipes": {}}
    assert not list(run.path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["images/../../evil_000.png", "../evil.png", "/tmp/evil.png"])
def test_nothing_is_written_outside_the_folder(name: str) -> None:
    run = folders.RunFolder(folders.new_run_folder("sample"), SPEC)
    before = sorted(run.path.parent.rglob("*"))
    with pytest.raises(StorageError, match="is no file in it"):
        run.save_picture(name, np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(StorageError, match="is no file in it"):
        run.write(name, "x")
    assert sorted(run.path.parent.rglob("*")) == before
    assert not Path("/tmp/evil.png").exists()


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ("done", "done"),
        ("cancelled", "cancelled"),
        ("failed", "failed"),
        ("progress", "unfinished"),
        (None, "unfinished"),
    ],
)
def test_the_last_event_is_the_state(last: str | None, state: str) -> None:
    run_of("20260102-030405-sample-abcd", last)
    (info,) = folders.list_runs()
    assert (info.state, info.command, info.model, info.created) == (
        state,
        "sample",
        "pocket-image",
        "2026-01-02T03:04:05",
    )


def test_runs_are_listed_newest_first_and_foreign_folders_left_out(data: Path) -> None:
    assert folders.list_runs() == []
    for name in ("20260101-000000-sample-aaaa", "20260103-000000-sample-bbbb", "20260102-000000-sample-cccc"):
        run_of(name, "done")
    (data / "runs" / "something").mkdir()
    (data / "runs" / "20260104-000000-sample-dddd").mkdir()
    (data / "runs" / "20260104-000000-sample-dddd" / "spec.json").write_text("{")
    assert [info.id[:8] for info in folders.list_runs()] == ["20260103", "20260102", "20260101"]


def test_damaged_calibrations_are_not_listed(data: Path) -> None:
    (data / "calibrations" / "damaged").mkdir(parents=True)
    (data / "calibrations" / "damaged" / "statistics.json").write_text("{}")
    assert folders.list_calibrations() == []


@pytest.mark.parametrize("what", ["write", "emit", "picture", "make"])
def test_a_full_disk_is_one_sentence(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = run_of("20260101-000000-sample-aaaa", None)
    run.write("report.json", '{"before": 1}')

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    for name in ("write_text", "open", "mkdir"):
        monkeypatch.setattr(Path, name, full)
    monkeypatch.setattr("PIL.Image.Image.save", full)
    actions = {
        "write": lambda: run.write("report.json", "{}"),
        "emit": lambda: run.emit({"kind": "done"}),
        "picture": lambda: run.save_picture("images/a.png", np.zeros((4, 4, 3), np.uint8)),
        "make": lambda: folders.RunFolder(tmp_path / "new", SPEC),
    }
    with pytest.raises(StorageError, match="No space left on device"):
        actions[what]()
    monkeypatch.undo()
    assert json.loads((run.path / "report.json").read_text()) == {"before": 1}, "what was finished is kept"
