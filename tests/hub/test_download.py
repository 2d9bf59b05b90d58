"""Fetching a model: what is asked for, refused, counted, kept after a stop and found again. The hub is a folder here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub.fake_hub import COMMIT, FakeHub
from trdq_core import models
from trdq_core.errors import Cancelled, ModelError, StorageError
from trdq_core.hub import download as downloading
from trdq_core.hub import store
from trdq_core.hub.files import check_id, wanted, wanted_files
from trdq_core.hub.known import KNOWN_MODELS, HubModel

REPO = "owner/tiny-pixart"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny pipeline as a repository: with pickles, other precisions, code and pictures lying about, too."""
    folder = shutil.copytree(tiny_folder, tmp_path / "repository")
    for name in ("transformer/model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors", "run.py", "big.png"):
        (folder / name).write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own."""
    monkeypatch.setenv("TRDQ_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def hub(repository: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real client talking to a hub of this machine."""
    from huggingface_hub import constants

    with FakeHub(REPO, repository).serving() as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield found


def test_a_model_arrives_whole_without_pickles_code_or_other_precisions(hub: FakeHub, data: Path) -> None:
    events: list[dict[str, Any]] = []
    found = downloading.download(REPO, on_event=events.append)
    here = {path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file()}
    assert "transformer/diffusion_pytorch_model.safetensors" in here
    assert not [name for name in here if name.endswith((".bin", ".py", ".png", ".fp16.safetensors"))]
    assert not {"run.py", "big.png", "transformer/model.bin"} & set(hub.asked)
    assert (found.revision, found.repo, found.name) == (COMMIT, REPO, "owner--tiny-pixart")
    counted = [event for event in events if event["kind"] == "progress"]
    assert [event["done"] for event in counted] == sorted(event["done"] for event in counted)
    assert counted[-1]["done"] == counted[-1]["total"]
    said = next(e["label"] for e in events[1:] if e["kind"] == "stage")
    assert "Downloading owner/tiny-pixart at 01234567 (its newest revision; no other was asked for)" in said


def test_a_fetched_model_is_listed_and_loads_by_name_and_by_id(hub: FakeHub) -> None:
    downloading.download(REPO)
    info = next(info for info in models.models() if info.name == "owner--tiny-pixart")
    assert (info.available, info.source, info.repo, info.revision) == (True, "hub", REPO, COMMIT)
    assert models.find_folder(REPO) == models.find_folder(info.name) == info.path
    assert models.listed_name(REPO) == info.name
    assert models.load_model(info.name).name == info.name


def test_what_is_here_is_not_fetched_again(hub: FakeHub) -> None:
    downloading.download(REPO)
    hub.asked.clear()
    downloading.download(REPO)
    assert hub.asked == []


def test_cancelling_keeps_whole_files_and_the_next_start_goes_on(hub: FakeHub) -> None:
    def enough() -> bool:
        return len(hub.asked) >= 4

    with pytest.raises(Cancelled, match="files that arrived whole are kept"):
        downloading.download(REPO, cancelled=enough)
    assert store.downloaded() == [], "half a model is none"
    first = set(hub.asked[:-1])
    hub.asked.clear()
    assert downloading.download(REPO).repo == REPO
    kept = first - {"model_index.json"} - set(hub.asked)
    assert kept, "what arrived before was fetched again"


def test_another_revision_replaces_the_one_before(hub: FakeHub, repository: Path) -> None:
    downloading.download(REPO)
    hub.commit = "f" * 40
    (repository / "transformer" / "config.json").write_text(
        (repository / "transformer" / "config.json").read_text() + " "
    )
    assert downloading.download(REPO).revision == "f" * 40
    assert (store.folder_of(REPO) / "transformer" / "config.json").read_text().endswith(" ")


def test_a_file_cut_short_is_told(hub: FakeHub) -> None:
    hub.broken.add("transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises((ModelError, StorageError), match=REPO):
        downloading.download(REPO)
    assert store.downloaded() == []


def test_a_full_disk_is_told_before_the_first_byte(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "free_disk", lambda: 1 << 20)
    with pytest.raises(StorageError, match="GB are to be fetched and 0.0 GB are free.*TRDQ_DATA_DIR"):
        downloading.download(REPO)
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.asked


def test_a_model_the_hub_does_not_have(hub: FakeHub) -> None:
    with pytest.raises(ModelError, match="somebody/else: the hub has no such model"):
        downloading.download("somebody/else")


def test_without_a_network_one_sentence_says_so(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="not on this machine, and HF_HUB_OFFLINE forbids"):
        downloading.download("latte-1")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        downloading.download("latte-1")


def test_the_command_fetches_and_says_where(hub: FakeHub, data: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "TRDQ_DATA_DIR": str(data)}
    done = subprocess.run(
        [sys.executable, "-m", "trdq_core", "download", REPO, "--json"], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == COMMIT
    assert "Downloading owner/tiny-pixart" in done.stderr


@pytest.mark.parametrize(
    "text", ["../x", "a/../b", "/etc/passwd", "a/b/c", "a", "a/b--c", "a/b.git", "a b/c", "", "a/" + "b" * 200]
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="an id of the hub is owner/name"):
        check_id(text)


def test_the_closed_list_is_well_formed() -> None:
    assert (
        len({model.name for model in KNOWN_MODELS}) == len({model.repo for model in KNOWN_MODELS}) == len(KNOWN_MODELS)
    )
    for model in KNOWN_MODELS:
        assert check_id(model.repo) and "/" not in model.name
        assert model.revision is not None and len(model.revision) == 40 and int(model.revision, 16)
        assert wanted(model.name) == wanted(model.repo) == model
    assert wanted("owner/name") == HubModel("owner--name", "owner/name", None, "image", "owner/name of the hub.")
    with pytest.raises(ModelError, match="models of the hub are pixart-sigma-512"):
        wanted("pixart")


def test_models_that_are_not_here_say_how_to_get_them(data: Path) -> None:
    info = next(info for info in models.models() if info.name == "latte-1")
    assert (info.available, info.path, info.kind) == (False, None, "video")
    with pytest.raises(
        ModelError, match="latte-1: not available, not on this machine; fetch it with: download latte-1"
    ):
        models.find_folder("latte-1")


INDEX = {"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}


@pytest.mark.parametrize(
    ("index", "names", "sentence"),
    [
        ({"_class_name": ["mine", "Pipeline"]}, [], "code of its own"),
        ({**INDEX, "vae": ["my_code", "VAE"]}, [], "vae is of 'my_code', code that is never run"),
        ({"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}, [], "has no transformer; UNets"),
        (INDEX, ["transformer/model.bin"], "as pickles only"),
        (INDEX, ["transformer/config.json"], "no safetensors file"),
        (
            {**INDEX, "..": ["diffusers", "X"]},
            ["../x.safetensors", "transformer/../x.safetensors"],
            "no safetensors file",
        ),
    ],
)
def test_what_would_not_be_loaded_is_not_fetched(index: dict[str, Any], names: list[str], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        wanted_files(REPO, index, names)


def test_components_that_are_left_empty_are_no_code() -> None:
    names = ["transformer/m.safetensors", "safety_checker/x.safetensors", "transformer/deep/er.json"]
    index = {**INDEX, "safety_checker": [None, None], "requires_safety_checker": True}
    assert wanted_files(REPO, index, names) == ["model_index.json", "transformer/m.safetensors"]
