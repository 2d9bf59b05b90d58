"""What counts as a change, and how a session reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trdq_core.errors import Cancelled
from trdq_core.folders import RunFolder
from trdq_core.presets import make_recipe, published_sharing, with_sharing
from trdq_core.session import Session
from trdq_core.specs import RunSpec


def test_only_recipes_that_quantize_or_share_change_the_denoiser() -> None:
    reference = make_recipe("fp")
    assert not reference.changes
    assert with_sharing(reference, published_sharing(8)).changes
    assert make_recipe("rtn").changes


def test_stages_and_progress_go_to_the_run_folder_and_can_be_cancelled(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    spec = RunSpec(command="profile", model="random-dit")
    stop: list[bool] = []
    folder = RunFolder(tmp_path / "run", spec, events.append)
    session = Session(spec, folder, lambda: bool(stop), torch.nn.Identity(), "torch")
    session.stage("fit", "Fitting rtn", "rtn")
    progress = session.progress("fit", 3, "rtn")
    progress.advance("first")
    stop.append(True)
    with pytest.raises(Cancelled, match="Cancelled during fit"):
        progress.advance("second")
    assert [event["kind"] for event in events] == ["stage", "progress", "progress"]
    assert events[1]["recipe"] == "rtn"
