"""Evaluations in the result tables: rows, one table for each bit-width, the best in bold, ablations apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.evaluation_tables import COLUMNS, is_evaluation, make_evaluation_tables


def facts(bits: str, sqnr: float, **others: Any) -> dict[str, Any]:
    quality = {"final_latent_sqnr_db": sqnr, "final_latent_sqnr_db_se": 0.5, "psnr": sqnr + 10, "gmsd": 1 / sqnr}
    return {"kind": "quantized", "bits": bits, "n": 128, "simulated": False, "effective_bits": 4.3, **quality, **others}


REPORT = {
    "command": "evaluate", "model": "pocket-image", "created": "2026-01-02T03:04:05",
    "machine": {"cpu": "a CPU", "threads": 2, "gpu": None}, "spec": {"steps": 20, "guidance": 3.5, "seed": 0},
    "evaluation": {"prompts": 64, "seeds": 2},
    "recipes": {
        "fp": {"kind": "reference"}, "fp-again": {"kind": "noise_floor"},
        "rtn-w4a4": facts("W4A4", 11.0), "tr-dq-w4a4": facts("W4A4", 15.0, encoder_kid=0.002, simulated=True),
        "rtn-w8a8": facts("W8A8", 40.0), "bad-w4a4": {"kind": "failed", "bits": "W4A4", "error": "no."},
    },
}  # fmt: skip


def test_an_evaluation_becomes_rows() -> None:
    rows = {(row["recipe"], row["metric"]): row for row in tables.rows_from_report(REPORT)}
    assert {recipe for recipe, _ in rows} == {"rtn-w4a4", "tr-dq-w4a4", "rtn-w8a8"}
    row = rows["rtn-w4a4", "final_latent_sqnr_db"]
    assert (row["value"], row["low"], row["high"], row["n"]) == ("11", "10.5", "11.5", "128")
    assert row["note"] == ("20 steps, guidance 3.5, first seed 0, 64 prompts, 2 seeds each; evaluation; bits W4A4")
    assert "simulated" in rows["tr-dq-w4a4", "psnr"]["note"]
    assert set(row) == set(tables.COLUMNS)
    assert all(map(is_evaluation, rows.values()))


def test_one_table_for_each_bit_width_best_first_and_in_bold() -> None:
    text = make_evaluation_tables(tables.rows_from_report(REPORT))
    assert text.index("**pocket-image, W8A8** on a CPU, 2 threads") < text.index("**pocket-image, W4A4**")
    assert text.index("| tr-dq-w4a4 |") < text.index("| rtn-w4a4 |")
    (best,) = [line for line in text.splitlines() if line.startswith("| tr-dq-w4a4")]
    assert "| **15.00 ± 0.50** | **25.00** | **0.0667** | 2.00 | simulated |" in best
    assert "| 11.00 ± 0.50 | 21.00 | 0.0909 |  | real |" in text
    assert "**40" not in text, "alone in its table, nothing is best"


def test_ablations_have_a_table_of_their_own() -> None:
    rows = [*tables.rows_from_report(REPORT), *tables.rows_from_report(REPORT, tag="ablation")]
    text = make_evaluation_tables(rows)
    assert text.count("**pocket-image, ") == 4
    assert text.index("**pocket-image, W4A4**") < text.index("**pocket-image, ablation at W4A4**")
    assert text.split("ablation at W4A4**")[1].count("| rtn-w") == 1


def test_evaluations_stay_out_of_the_other_tables() -> None:
    rows = tables.rows_from_report(REPORT)
    assert "W4A4" not in tables.make_tables(rows, brief=True)
    long = tables.make_tables(rows, brief=False)
    assert long == make_evaluation_tables(rows)
    assert make_evaluation_tables([]) == ""


def test_adding_an_evaluation_rewrites_the_long_page_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/results.md", "docs/kernels.md"):
        (tmp_path / page).write_text(f"{tables.BEGIN}\n{tables.END}\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables.add_rows, "__defaults__", (tmp_path / "results.csv",))
    monkeypatch.setattr(tables.read_results, "__defaults__", (tmp_path / "results.csv",))
    monkeypatch.setattr(tables.rewritten, "__defaults__", (tmp_path,))
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT))
    assert tables.main(["--add", str(tmp_path / "evaluation.json")]) == 0
    assert "pocket-image, W4A4" in (tmp_path / "docs" / "results.md").read_text()
    assert "rtn" not in (tmp_path / "README.md").read_text()
    assert tables.main(["--check"]) == 0
    assert len(tables.read_results()) == sum(len(COLUMNS.keys() & row) for row in REPORT["recipes"].values())
