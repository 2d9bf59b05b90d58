"""Folders under --model-root: listed by name, never reached by a path, and said why one cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trdq_core import cli, local_models, models
from trdq_core.errors import ModelError


@pytest.fixture
def root(tiny_folder: Path, tiny_video_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with two pipelines, a UNet's, a damaged one, a link out of it and a plain folder."""
    base = tmp_path / "models"
    shutil.copytree(tiny_folder, base / "mine")
    shutil.copytree(tiny_video_folder, base / "clips")
    for name, text in (
        ("unet", '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}'),
        ("broken", "{"),
    ):
        (base / name).mkdir()
        (base / name / "model_index.json").write_text(text)
    (base / "plain").mkdir()
    (base / "link").symlink_to(tiny_folder)
    (base / "pocket-image").mkdir()
    (base / "pocket-image" / "model_index.json").write_text(json.dumps({"_class_name": "X", "transformer": ["a", "b"]}))
    monkeypatch.setenv(local_models.ROOT_VARIABLE, str(base))
    return base


def test_folders_are_listed_by_name_with_their_kind(root: Path) -> None:
    found = {one.name: one for one in local_models.under_root()}
    assert set(found) == {"mine", "clips", "unet", "broken", "pocket-image"}
    assert (found["mine"].kind, found["clips"].kind) == ("image", "video")
    assert "has no transformer; UNets are not quantized" in found["unet"].reason
    assert "damaged" in found["broken"].reason


def test_a_listed_folder_is_a_model_and_the_repositorys_own_come_first(root: Path) -> None:
    known = {info.name: info for info in models.models()}
    assert (known["mine"].path, known["mine"].source, known["mine"].available) == (root / "mine", "folder", True)
    assert known["pocket-image"].source == "repository"
    assert not known["unet"].available
    assert models.load_model("mine").name == "mine"
    with pytest.raises(
        ModelError, match="unet: not available, its pipeline StableDiffusionPipeline has no transformer"
    ):
        models.find_folder("unet")


@pytest.mark.parametrize("name", ["../mine", "models/mine", "plain", "link", ""])
def test_names_that_are_not_listed_are_no_models_of_the_root(root: Path, name: str) -> None:
    assert name not in {info.name for info in models.models()}


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--model-root", str(tmp_path / "none")]) == 2
    assert "--model-root: there is no folder" in capsys.readouterr().err


def test_the_command_lists_what_the_root_holds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--model-root", str(root)]) == 0
    shown = capsys.readouterr().out
    assert (
        "mine" in shown
        and "zai-org/CogView4-6B at 63a52b7f" in shown
        and "black-forest-labs/FLUX.1-schnell at 741f7c3c" in shown
    )
