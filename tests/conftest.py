"""Shared by all tests: no network, a data folder of their own, and skips with a reason for what this machine lacks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before any test imports torch, diffusers or gradio; processes that tests start inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_OFFLINE="1",
    GRADIO_ANALYTICS_ENABLED="False",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
)
# Several processes of tests share the cores: one thread each is fastest then, and what they start inherits it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads this when it is first imported, whoever imports it: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("TRDQ_CHROMIUM") or shutil.which("chromium")
# Runs and calibrations of the tests go here, never among the person's own.
_DATA = tempfile.TemporaryDirectory(prefix="trdq-tests-", ignore_cleanup_errors=True)
os.environ["TRDQ_DATA_DIR"] = _DATA.name


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _remove_data() -> Iterator[None]:
    yield
    _DATA.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say why."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("browser") and not CHROMIUM:
            item.add_marker(pytest.mark.skip(reason="needs Chromium; install it or set TRDQ_CHROMIUM to its path"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a PixArt-Sigma pipeline of random weights; do not change it, copy it."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-pixart")


@pytest.fixture(scope="session")
def tiny_video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a Latte pipeline of random weights; do not change it, copy it."""
    from tests.tiny import save_tiny_video

    return save_tiny_video(tmp_path_factory.mktemp("models") / "tiny-latte")
