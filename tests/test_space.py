"""A Hugging Face Space: the checkout as it is, read-only, without a home, used by a script to the end of a comparison."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PUSHED = ("app.py", "README.md", "requirements.txt", "trdq_core", "studio", "assets")
GIVEN_BY_SPACES = {
    "SPACE_ID": "somebody/trdq-studio", "SPACE_HOST": "somebody-trdq-studio.hf.space", "SPACE_AUTHOR_NAME": "somebody",
    "SPACE_REPO_NAME": "trdq-studio", "SYSTEM": "spaces",
}  # fmt: skip


def front_matter() -> dict[str, str]:
    """The README's head as a Space reads it."""
    head = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    return {
        key: value.strip().strip('"') for key, _, value in (line.partition(":") for line in head.strip().splitlines())
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_head_of_the_readme_is_what_a_space_needs() -> None:
    head = front_matter()
    needed = re.search(r"gradio>=(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text())
    assert needed is not None
    assert tuple(map(int, head["sdk_version"].split(".")[:2])) >= tuple(map(int, needed.groups()))
    assert (head["sdk"], head["app_file"], head["python_version"]) == ("gradio", "app.py", "3.11")
    assert (ROOT / head["app_file"]).is_file()
    assert len(head["short_description"]) <= 60
    assert 'python_version: "3.11"' in (ROOT / "README.md").read_text(), "without quotes YAML reads a number"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of the studio as a Space runs it for the first time, and its checkout: kernels are yet to be compiled,
    the pocket model to be calibrated."""
    base = tmp_path_factory.mktemp("space")
    checkout, temporary = base / "app", base / "tmp"
    temporary.mkdir()
    checkout.mkdir()
    for name in PUSHED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, checkout / name)
    for path in (*checkout.rglob("*"), checkout):
        path.chmod(path.stat().st_mode & ~0o222)
    (base / "file").write_text("")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRDQ_", "XDG_", "GRADIO_"))}
    port = free_port()
    environment = {
        **kept, **GIVEN_BY_SPACES, "HOME": str(base / "file" / "home"), "TMPDIR": str(temporary),
        "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    with (base / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=checkout, env=environment, stdout=log, stderr=log)
    try:
        wait_for(port, process, base / "log")
        yield f"http://127.0.0.1:{port}", checkout
    finally:
        process.terminate()
        process.wait(30)
        for path in (checkout, *(path for path in checkout.rglob("*") if path.is_dir())):
            path.chmod(0o755)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    """Return once the port answers; fail with the log if the process ends or time runs out."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def client_of(url: str) -> Any:
    from gradio_client import Client

    return Client(url, verbose=False)


@pytest.mark.slow
def test_a_script_compares_on_a_space_to_the_end(space: tuple[str, Path]) -> None:
    url, checkout = space
    client = client_of(url)
    known = {info["name"]: info for info in client.predict(api_name="/list_models")}
    assert known["pocket-image"]["available"]
    job = client.submit("pocket-image", "rtn-w8a8", "red apple", 20, 3.5, 0, 1, api_name="/compare")
    found = job.result(timeout=420)  # after the preparation, which began before
    assert found["state"] == "done", found
    assert found["calibration"]["reused"] and found["calibration"]["prompts"] == 16
    commands = [(run["command"], run["model"], run["state"]) for run in client.predict(api_name="/list_runs")]
    assert commands == [("compare", "pocket-image", "done"), ("calibrate", "pocket-image", "done")]
    assert list((checkout.parent / "tmp").rglob("trdq-kernels-*.so")), "the kernels were compiled for this Space"
    assert found["recipes"]["rtn-w8a8"]["kernels"], "and run"
    assert any(told["state"] == "running" for told in job.outputs()[:-1]), "nothing was told on the way"
    assert set(found["recipes"]) == {"fp", "rtn-w8a8"}
    assert found["recipes"]["rtn-w8a8"]["psnr"] > 20 and not found["recipes"]["rtn-w8a8"]["simulated"]
    for url_of_picture in found["pictures"].values():
        head, _, data = url_of_picture.partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 128)
    assert str(checkout.parent) not in str(found), "a path of the server was told"
    pushed = {path for path in checkout.rglob("*") if "__pycache__" not in path.parts}
    assert {path.relative_to(checkout).parts[0] for path in pushed} == set(PUSHED), (
        "something was written into the checkout"
    )


@pytest.mark.slow
def test_a_space_fetches_no_models_and_takes_no_paths(space: tuple[str, Path]) -> None:
    url, checkout = space
    client = client_of(url)
    from gradio_client.exceptions import AppError

    for model in (str(checkout / "assets" / "pocket-image"), "latte-1", "owner/name"):
        with pytest.raises(AppError, match="model"):
            client.predict(model, "rtn-w8a8", "red apple", 2, 3.5, 0, 1, api_name="/compare")
    assert "Get a model" not in str(client.config)


def test_ids_are_never_typed_on_a_space() -> None:
    environment = {**os.environ, **GIVEN_BY_SPACES}
    done = subprocess.run(
        [sys.executable, "app.py", "--allow-hub"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "a Space is open to anybody" in done.stderr
