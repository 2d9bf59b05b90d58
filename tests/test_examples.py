"""The examples run as they stand, on a tiny model: one after the other, since the last loads what the one before wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--steps", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder for all of them, so that one calibration serves each."""
    return tmp_path_factory.mktemp("examples")


def start(name: str, data: Path, *words: str) -> str:
    """What an example prints."""
    environment = {**os.environ, "TRDQ_DATA_DIR": str(data), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *words], cwd=data, env=environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"compare", "quantize_and_save", "load_quantized", "sharing"}


@pytest.mark.slow
def test_compare(data: Path, tiny_folder: Path) -> None:
    shown = start("compare", data, "--model", str(tiny_folder), "--calibration-prompts", "1", *TINY)
    assert "rtn-w4a8: PSNR " in shown and "tr-dq-w4a8: PSNR " in shown
    folder = Path(shown.strip().splitlines()[-1].partition(": ")[2])
    assert (folder / "images" / "tr-dq-w4a8_000.png").is_file()


@pytest.mark.slow
def test_a_quantized_model_is_saved_and_loaded_by_diffusers(data: Path, tiny_folder: Path) -> None:
    saved = str(data / "saved")
    words = (saved, "--model", str(tiny_folder), "--recipe", "smoothquant-w4a8", "--calibration-prompts", "1", *TINY)
    assert "of which the denoiser" in start("quantize_and_save", data, *words)
    denoiser = sum(path.stat().st_size for path in (data / "saved" / "transformer").iterdir())
    before = sum(path.stat().st_size for path in (tiny_folder / "transformer").iterdir())
    assert denoiser < before
    shown = start("load_quantized", data, saved, "--out", str(data / "picture.png"), *TINY)
    assert "16 x 16" in shown
    assert Image.open(data / "picture.png").size == (16, 16)


@pytest.mark.slow
def test_sharing(data: Path, tiny_folder: Path) -> None:
    shown = start("sharing", data, "--model", str(tiny_folder), "--threshold", "2", *TINY)
    assert "the plan shares 2 blocks" in shown
    assert "with it the pictures keep" in shown
