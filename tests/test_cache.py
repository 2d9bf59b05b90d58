"""The cache folder: the person's own where it can be written, else a private one in the temporary folder."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest

from trdq_core import cache, folders
from trdq_core.kernels import build


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for function in (cache._can_be_written, cache._temporary):
        function.cache_clear()
    for name in ("XDG_CACHE_HOME", "TRDQ_DATA_DIR", "TRDQ_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_the_home_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_root() == tmp_path / "home" / ".cache"
    assert folders.data_folder() == tmp_path / "home" / ".cache" / "trdq-studio"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "trdq" / "kernels"


def test_without_a_home_that_can_be_written_a_private_folder_stands_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))  # not even root can make this one
    found = cache.cache_root()
    assert found.parent == tmp_path / "tmp"
    assert not stat.S_IMODE(found.stat().st_mode) & 0o077
    assert folders.data_folder().parent == build.cache_folder().parents[1] == found


def test_a_folder_that_others_can_write_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    taken = cache.cache_root()
    taken.chmod(0o777)
    cache._temporary.cache_clear()
    assert cache.cache_root() != taken
