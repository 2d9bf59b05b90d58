"""A studio over the fake core, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from studio.context import Studio
from studio.services.form import Form
from tests.studio.fake_core import FakeCore


@pytest.fixture
def core(tmp_path: Path) -> FakeCore:
    """The fake core."""
    return FakeCore(tmp_path)


@pytest.fixture
def studio(core: FakeCore) -> Studio:
    """A studio over it."""
    return Studio.over(core)


@pytest.fixture
def form() -> Form:
    """Controls as they stand when the page opens, with a prompt."""
    return Form(prompt="red apple")
