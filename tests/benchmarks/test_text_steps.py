"""Steps with a known and with a new text: what is timed, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import text_steps
from benchmarks.tables import read_results
from trdq_core.kernels import native


def test_each_round_begins_with_a_text_that_nobody_has_seen() -> None:
    seen: list[Tensor] = []
    known, new = text_steps.rounds_of(seen.append, torch.ones(3), 2)
    assert len(known) == len(new) == 2
    first, again, second, last = seen
    assert first is again
    assert second is last
    assert first is not second


def test_the_share_is_of_each_round() -> None:
    rows = {row["metric"]: row for row in text_steps.rows_of("tiny", "tr-dq-w8a8", [8.0, 9.0], [10.0, 10.0])}
    assert rows["text_share"]["value"] == pytest.approx(0.15)
    assert rows["new_text_ms"]["value"] == 10.0
    assert {row["note"] for row in rows.values()} == {"text"}


def test_the_command_measures_for_real(tiny_folder: Path, tmp_path: Path) -> None:
    if native.unavailable_reason() is not None:
        pytest.skip("what is remembered is remembered by the fused C++ path")
    out = tmp_path / "results.csv"
    given = ["--model", str(tiny_folder), "--recipes", "rtn-w8a8", "--rounds", "4", "--add", "--out", str(out)]
    text_steps.main(given)
    rows = {row["metric"]: float(row["value"]) for row in read_results(out)}
    assert set(rows) == {"known_text_ms", "new_text_ms", "text_share"}
    assert rows["known_text_ms"] > 0
    assert rows["text_share"] < 1
