"""Tables of recipes beside other tools: rows with spread, fastest first, reasons of what failed below."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peer_rows import best_rivals, is_rival, rows_from_peers
from benchmarks.peer_tables import is_peers, make_peer_tables
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
                            weight_bytes=2**21, file_bytes=3 * 2**20, bf16_file_bytes=10 * 2**20,
                            quantized_layers=72, transformed_layers=36, rotation_quantize_share=0.0625,
                            calibration_seconds=12.5),
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
    assert psnr["note"] == "20 steps, guidance 3.5, seed 0; peers; run 2026-11-21T10:00:00; int8 VNNI x 80"
    assert found["peer-x", "speedup"]["value"] == "2.5"
    assert found["peer-x", "speedup_compiled"]["value"] == "2.0"
    assert found["peer-x", "psnr"]["note"].endswith("; int8, odd x 80")
    assert found["peer-y", "failed"]["note"].split("; ")[3] == (
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
    assert "| 16.0 (15.0–17.0) | 2.50 | 2.00 | 1.00 |" in quick
    assert "Best other tool: peer-x; of those that quantize." in lines[0]
    ours = next(line for line in lines if line.startswith("| rtn-w8a8"))
    assert "| 6.2 |" in ours and "| 36 of 72 |" in ours and "| 0.300 |" in ours
    assert quick.endswith("| int8, odd x 80 |")
    assert lines[-1] == "- peer-y: y is not installed, pip install y brings it."
    assert "failed" not in lines[2]


def test_a_table_is_one_whole_run_and_the_latest(report: dict[str, Any]) -> None:
    """A later run of the same day takes the place of the whole table; one without reference or tools takes none."""
    rows = rows_from_peers(report, HEAD)
    recipes = report["recipes"]
    later = {"fp": row("reference", 50.0), "peer-y": row("peer", 20.0, kernels={}),
             "peer-x": {"kind": "failed", "error": "peer-x: x broke.", "simulated": False}}  # fmt: skip
    rows += rows_from_peers({**report, "created": "2026-11-21T11:00:00", "recipes": later}, HEAD)
    part = {"rtn-w8a8": recipes["rtn-w8a8"]}
    rows += rows_from_peers({**report, "created": "2026-11-21T12:00:00", "recipes": part}, HEAD)
    table = make_peer_tables(rows)
    assert "| peer-y |" in table and "| 50.0 (49.0–51.0) |" in table
    assert "rtn-w8a8" not in table, "no number of another run"
    assert table.endswith("Did not run:\n\n- peer-x: x broke.")
    assert "| peer-x |" not in table, "what failed last does not keep its old figures"


def test_speeds_are_medians_of_rounds_with_their_spread(report: dict[str, Any]) -> None:
    """A machine that slows down for all in some rounds changes no ratio; against a tool that failed there is none."""
    report["recipes"] = {
        "fp": row("reference", 40.0, round_ms=[40.0, 80.0, 40.0, 44.0]),
        "tr-dq-w8a8": row("quantized", 10.0, round_ms=[10.0, 20.0, 10.0, 10.0]),
        "peer-openvino-int8": row("peer", 8.0, round_ms=[8.0, 16.0, 8.0, 8.0]),
        "peer-torchao-int8-compile": row("peer", 20.0, round_ms=[20.0, 40.0, 20.0, 20.0]),
        "peer-openvino-bf16": row("peer", 5.0, round_ms=[5.0, 5.0, 5.0, 5.0]),
        "peer-torch-compile": {"kind": "failed", "error": "no compiler", "simulated": False},
    }
    found = {one["metric"]: one for one in rows_from_peers(report, HEAD) if one["recipe"] == "tr-dq-w8a8"}
    assert [found["speedup"][key] for key in ("value", "low", "high", "n")] == ["4.0", "4.0", "4.4", "4"]
    assert found["speedup_rival"]["value"] == "0.8"
    assert found["speedup_other_rival"]["value"] == "2.0"
    assert "speedup_compiled" not in found


def test_rivals_are_tools_that_quantize() -> None:
    assert is_rival("peer-openvino-int8-all") and is_rival("peer-sdnq-int8")
    references = ("fp", "tr-dq-w8a8", "peer-torch-compile", "peer-openvino-fp32", "peer-openvino-bf16")
    assert not any(is_rival(name) for name in references)
    recipes = {"peer-openvino-int8": row("peer", 5.0), "peer-quanto-int8": {"kind": "failed"}}
    assert best_rivals(recipes) == {"speedup_rival": "peer-openvino-int8"}


def test_rows_tell_where_the_compiler_gave_up(report: dict[str, Any]) -> None:
    report["recipes"]["peer-x"]["compiled"] = {"frames": 3, "given_up": 2, "graph_breaks": 0}
    note = next(one["note"] for one in rows_from_peers(report, HEAD) if one["recipe"] == "peer-x")
    assert note.endswith("int8, odd x 80, frames that torch.compile gave up: 2")


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
