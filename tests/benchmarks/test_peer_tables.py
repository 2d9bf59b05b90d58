"""Tables of recipes beside other tools: rows with spread, fastest first, reasons of what failed below."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peer_tables import is_peers, make_peer_tables, rows_from_peers
from benchmarks.tables import COLUMNS, make_tables, rows_from_report
from trdq_core.presets import PEERS

HEAD = {"date": "2026-11-21", "device": "A CPU", "threads": 2, "model": "pocket-image"}


def row(kind: str, step: float, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "step_ms": {"median": step, "p10": step - 1, "p90": step + 1, "n": 15}, **facts}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "command": "compare",
        "created": "2026-11-21T10:00:00",
        "machine": {"cpu": "A CPU", "threads": 2},
        "model": "pocket-image",
        "spec": {"steps": 20, "guidance": 3.5, "seed": 0},
        "recipes": {
            "fp": row("reference", 40.0, kernels={"float32 linear": 80}),
            "fp-again": row("noise_floor", 40.5),
            "rtn-w8a8": row("quantized", 25.0, psnr=31.25, psnr_std=2.0, n=32, kernels={"int8 VNNI": 80},
                            weight_bytes=2**21, file_bytes=3 * 2**20, calibration_seconds=12.5),
            "peer-torch-compile": row("peer", 32.0, kernels={"float32, torch.compile": 100}),
            "peer-x": row("peer", 16.0, psnr=29.0, psnr_std=1.0, n=32, kernels={"int8; odd": 80}),
            "peer-y": {"kind": "failed", "error": "peer-y: y is not installed; pip install y brings it.", "simulated": False},
        },
    }  # fmt: skip


def test_rows_have_numbers_spread_and_arithmetic(report: dict[str, Any]) -> None:
    rows = rows_from_report(report, tag="peers")
    assert rows == rows_from_peers(report, HEAD)
    assert all(set(one) == set(COLUMNS) and is_peers(one) for one in rows)
    assert "fp-again" not in {one["recipe"] for one in rows}
    found = {(one["recipe"], one["metric"]): one for one in rows}
    psnr = found["rtn-w8a8", "psnr"]
    assert (psnr["value"], psnr["low"], psnr["high"], psnr["n"]) == ("31.25", "29.25", "33.25", "32")
    assert psnr["note"] == "20 steps, guidance 3.5, seed 0; peers; int8 VNNI x 80"
    assert found["peer-x", "speedup"]["value"] == "2.5"
    assert found["peer-x", "speedup_compiled"]["value"] == "2.0"
    assert found["peer-x", "psnr"]["note"].endswith("; peers; int8, odd x 80")
    assert found["peer-y", "failed"]["note"].split("; ")[2] == (
        "failed: peer-y: y is not installed, pip install y brings it."
    )


def test_the_table_has_the_fastest_first_and_reasons_below(report: dict[str, Any]) -> None:
    table = make_peer_tables(rows_from_peers(report, HEAD))
    lines = table.splitlines()
    assert lines[0].startswith("**pocket-image, other tools in the same run** on A CPU, 2 threads. 20 steps")
    assert "32 prompts; 15 rounds, interleaved; measured 2026-11-21" in lines[0]
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:]
    assert names == ["| peer-x", "| rtn-w8a8", "| peer-torch-compile", "| fp"]
    quick = next(line for line in lines if line.startswith("| peer-x"))
    assert "| 29.00 (28.00–30.00) |" in quick
    assert "| 16.0 (15.0–17.0) | 2.50 | 2.00 |" in quick
    assert quick.endswith("| int8, odd x 80 |")
    assert lines[-1] == "- peer-y: y is not installed, pip install y brings it."
    assert "failed" not in lines[2]


def test_a_tool_that_runs_now_is_no_longer_among_the_failed(report: dict[str, Any]) -> None:
    rows = rows_from_peers(report, HEAD)
    report["recipes"] = {"peer-y": row("peer", 20.0, kernels={})}
    rows += rows_from_peers(report, {**HEAD, "date": "2026-11-22"})
    table = make_peer_tables(rows)
    assert "Did not run" not in table
    assert "| peer-y |" in table


def test_only_the_long_pages_show_them(report: dict[str, Any]) -> None:
    rows = rows_from_report(report, tag="peers")
    assert "other tools" not in make_tables(rows, brief=True)
    assert make_tables(rows, brief=False).count("**pocket-image") == 1


def test_the_benchmark_names_every_tool_and_builds_a_run() -> None:
    names = peers.recipe_names()
    assert {f"peer-{name}" for name in PEERS} < set(names)
    spec = peers.specification("random-dit", names, rounds=2, steps=4)
    assert [recipe.name for recipe in spec.recipes] == names
    assert spec.timing_rounds == 2
