"""What swapping sets costs: shares counted from steps, and a run of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import switching
from benchmarks.switching import SwitchedRun
from benchmarks.tables import read_results


def test_shares_are_counted_from_steps_and_swaps() -> None:
    """Twenty steps of 10 ms, of which three hold a swap of 1 ms and lose another 0.5."""
    steps = [10.0] * 20
    for index in (5, 10, 15):
        steps[index] = 11.5
    run = SwitchedRun(steps, {5: 1.0, 10: 1.0, 15: 1.0})
    assert run.run_ms == pytest.approx(204.5)
    assert run.swap_share == pytest.approx(3 / 204.5)
    assert run.switch_share == pytest.approx(4.5 / 204.5)


def test_rows_carry_medians_over_runs() -> None:
    runs = [SwitchedRun([10.0, 12.0, 10.0, 10.0], {1: swap}) for swap in (1.0, 1.5, 2.0)]
    rows = {row["metric"]: row for row in switching.rows_of("tiny", "tr-dq-w8a8", 2, runs)}
    assert rows["swap_ms"]["value"] == 1.5
    assert rows["swap_share"]["value"] == pytest.approx(1.5 / 42, abs=1e-5)
    assert rows["swaps"]["value"] == 1
    assert {row["recipe"] for row in rows.values()} == {"tr-dq-w8a8-2-groups"}
    assert all(row["note"] == "4 steps, 2 time groups; switching" for row in rows.values())


def test_the_command_swaps_for_real(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four steps through two groups: one swap within the run, and one back to the first group at its start."""
    monkeypatch.setattr(switching, "PROMPTS", ("red apple",))
    out = tmp_path / "results.csv"
    given = ["--model", str(tiny_folder), "--groups", "2", "--steps", "4", "--runs", "2", "--add", "--out", str(out)]
    switching.main(given)
    rows = {row["metric"]: row for row in read_results(out)}
    assert set(rows) == {"run_ms", "swaps", "swap_ms", "swap_share", "switch_share"}
    assert float(rows["swaps"]["value"]) == 2
    assert 0 < float(rows["swap_share"]["value"]) < 1
    assert "swap_share" in capsys.readouterr().out
