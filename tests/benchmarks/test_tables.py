"""The generator of the result tables: reports become rows, rows become Markdown, pages are what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables
from tests.fake_runs import REPORT

HEAD = {"date": "2026-01-02", "device": "a CPU", "threads": "2", "model": "pocket-image", "note": "20 steps"}


def row(recipe: str, metric: str, value: float, **others: str) -> tables.Row:
    """One row of the results file."""
    return {**HEAD, "recipe": recipe, "metric": metric, "value": str(value), "low": "", "high": "", "n": "", **others}


def test_a_report_becomes_rows() -> None:
    step = {"median": 15.0, "p10": 14.0, "p90": 16.0, "n": 9}
    report = {**REPORT, "created": "2026-01-02T03:04:05", "spec": {"steps": 20, "guidance": 3.5, "seed": 0}}
    report["recipes"] = {**REPORT["recipes"], "rtn-w8a8": {"kind": "quantized", "step_ms": step, "psnr": 30.0, "n": 2}}
    rows = {(r["recipe"], r["metric"]): r for r in tables.rows_from_report(report)}
    assert (rows["rtn-w8a8", "step_ms"]["value"], rows["rtn-w8a8", "step_ms"]["high"]) == ("15.0", "16.0")
    assert rows["rtn-w8a8", "speedup"]["value"] == "2.0"
    assert rows["tr-dq-w4a8", "weight_share"]["value"] == "0.15"
    assert "simulated" in rows["rtn-w4a4", "psnr"]["note"]
    assert ("rtn-w4a4", "step_ms") not in rows, "a simulated recipe has no time"
    assert set(rows["fp", "step_ms"]) == set(tables.COLUMNS)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    tables.add_rows([row("fp", "psnr", 1.5)], file)
    tables.add_rows([row("fp", "ssim", 0.5, note='a "quoted", note')], file)
    assert tables.read_results(file) == [row("fp", "psnr", 1.5), row("fp", "ssim", 0.5, note='a "quoted", note')]
    assert tables.read_results(tmp_path / "none.csv") == []


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="its columns are"):
        tables.read_results(file)


def test_the_latest_measurement_is_shown_and_spreads_only_in_the_long_table() -> None:
    rows = [
        row("fp", "step_ms", 40.0, date="2026-01-01"),
        row("fp", "step_ms", 30.0, low="29", high="31"),
        row("rtn-w4a4", "psnr", 11.0, note="20 steps; simulated"),
        row("fp", "weight_bytes", 2**20),
    ]
    brief, long = tables.make_tables(rows, brief=True), tables.make_tables(rows, brief=False)
    assert "| fp |  | 30.0 | 1.00 |" in brief
    assert "30.0 (29.0–31.0)" in long
    assert "| rtn-w4a4 (simulated) | 11.0 |  |  |" in brief
    assert "measured 2026-01-02." in brief
    assert "40.0" not in long


def test_a_video_model_has_a_table_of_its_own_with_flicker_and_motion() -> None:
    facts = {"kind": "quantized", "psnr": 30.0, "n": 4, "temporal_error_mean": 1.25, "motion_ratio_mean": 0.987}
    report = {"model": "pocket-video", "created": "2026-01-02T03:04:05", "machine": {"cpu": "a CPU", "threads": 2}}
    rows = tables.rows_from_report({**report, "recipes": {"fp": {}, "rtn-w4a8": facts}})
    for brief in (True, False):
        pictures, clips = tables.make_tables([row("rtn-w8a8", "psnr", 40.0), *rows], brief=brief).split("\n\n**")
        assert "temporal error" not in pictures
        assert clips.startswith("pocket-video** on a CPU, 2 threads.")
        assert "motion: mean squared frame difference" in clips
        assert "| temporal error | motion |" in clips and "| 1.25 | 0.987 |" in clips


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    assert tables.between_markers(text, "new") == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter"
    with pytest.raises(ValueError, match="missing"):
        tables.between_markers("no markers", "new")


def test_the_pages_say_what_the_results_file_says() -> None:
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"
