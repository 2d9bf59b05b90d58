"""Cleaning the data folder: old sets and learnt rounding go, everything else stays."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from trdq_core import cli
from trdq_core.cleaning import clean, leftovers
from trdq_core.errors import RecipeError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRDQ_DATA_DIR", str(tmp_path))
    places = {"sets/old.safetensors": 40, "sets/new.safetensors": 1, "reconstructions/a/unit.safetensors": 90,
              "reconstructions/b/unit.safetensors": 90, "runs/r/report.json": 400, "calibrations/c/statistics.json": 400,
              "recipes/mine.json": 400}  # fmt: skip
    for name, days in places.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 100)
        then = time.time() - days * 86_400
        os.utime(file, (then, then))
    then = time.time() - 90 * 86_400
    os.utime(tmp_path / "reconstructions" / "a", (then, then))  # b is old, but something was put into it today
    (tmp_path / "sets" / "link").symlink_to(tmp_path / "runs")
    return tmp_path


def test_only_what_is_old_and_made_again_goes(data: Path) -> None:
    assert [one.path.name for one in clean(30, dry_run=True)] == ["a", "old.safetensors"]
    assert (data / "sets" / "old.safetensors").exists()
    assert [one.path.name for one in clean(30)] == ["a", "old.safetensors"]
    left = {str(file.relative_to(data)) for file in data.rglob("*") if file.is_file()}
    assert left == {
        "sets/new.safetensors", "reconstructions/b/unit.safetensors", "runs/r/report.json", "calibrations/c/statistics.json",
        "recipes/mine.json",
    }  # fmt: skip
    clean(0)
    assert not any((data / "sets").iterdir()) and not any((data / "reconstructions").iterdir())
    assert (data / "runs" / "r" / "report.json").is_file()  # the link went, not what it led to


def test_the_command_lists_and_removes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clean", "--older-than", "30", "--dry-run"]) == 0
    assert "would be removed" in capsys.readouterr().out
    assert cli.main(["clean", "--older-than", "30", "--json"]) == 0
    assert [Path(one["path"]).name for one in json.loads(capsys.readouterr().out)] == ["a", "old.safetensors"]
    assert cli.main(["clean", "--older-than", "30"]) == 0
    assert "Nothing" in capsys.readouterr().out
    assert cli.main(["clean", "--older-than", "-1"]) == 2


def test_days_are_a_number_of_days(data: Path) -> None:
    for days in (-1, float("nan"), 1e9):
        with pytest.raises(RecipeError, match="--older-than: got"):
            leftovers(days)
