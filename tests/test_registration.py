"""Joining diffusers: nothing heavy until somebody needs it, and names that are found when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trdq_core
from trdq_core import registration

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_library_imports_no_diffusers_and_diffusers_then_knows_it() -> None:
    code = (
        "import sys, trdq_core; assert 'diffusers' not in sys.modules and 'torch' not in sys.modules;"
        "from diffusers.quantizers import auto; print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING['trdq'].__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "TRDQConfig"


def test_public_names_are_there_and_others_are_not() -> None:
    for name in registration.EXPORTS:
        assert getattr(trdq_core, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trdq_core.nothing
