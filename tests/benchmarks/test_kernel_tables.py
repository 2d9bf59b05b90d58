"""The generated part of docs/kernels.md: whole steps, calls and swaps, and what it says where nothing was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.kernel_tables import is_kernels, make_kernel_page
from benchmarks.peer_rows import rows_from_peers

HEAD = {"date": "2026-11-21", "device": "A CPU", "threads": "2"}
SHAPE = "CPU kernels, linear 512x1152x4608"


def row(model: str, recipe: str, metric: str, value: float, note: str, **others: str) -> tables.Row:
    """One row of the results file."""
    cells = {"metric": metric, "value": str(value), "low": "", "high": "", "n": "25", "note": note}
    return {**HEAD, "model": model, "recipe": recipe, **cells, **others}


def calls() -> list[tables.Row]:
    """Two measurements of two calls; the later stands below in the file."""
    note = "copy 20 GB/s, float32 500 and int8 1900 GOP/s measured, avx512_vnni kernels"
    return [
        row(SHAPE, "float32 F.linear", "call_us", 9000, note, date="2026-11-20"),
        row(SHAPE, "float32 F.linear", "call_us", 8000, note, low="7900", high="8200"),
        row(SHAPE, "product alone, int8", "call_us", 2500, note),
        row(SHAPE, "product alone, int8", "bound_share", 0.684, note),
    ]


def swaps() -> list[tables.Row]:
    """One measurement of switching."""
    note = "20 steps, 4 time groups; switching"
    return [
        row("random-dit", "tr-dq-w8a8-4-groups", "swap_ms", 1.1, note, low="1.0", high="1.5"),
        row("random-dit", "tr-dq-w8a8-4-groups", "swap_share", 0.0112, note, low="0.01", high="0.015"),
    ]


def steps() -> list[tables.Row]:
    """A run of ours beside the reference and a tool."""
    times = {"fp": 40.0, "tr-dq-w8a8": 16.0, "rtn-w8a8": 15.0, "peer-torchao-int8": 32.0}
    kind = {"kind": "quantized", "kernels": {}}
    recipes: dict[str, dict[str, Any]] = {
        name: {**kind, "step_ms": {"median": ms, "p10": ms, "p90": ms, "n": 15}, "round_ms": [ms] * 15}
        for name, ms in times.items()
    }
    recipes["tr-dq-w8a8"] |= {"rotation_quantize_share": 0.0712, "product_peak_share": 0.653}
    report = {"created": "2026-11-21T10:00:00", "spec": {"steps": 4, "guidance": 3.5, "seed": 0}, "recipes": recipes}
    return rows_from_peers(report, {**HEAD, "model": "random-dit"})


def test_without_rows_each_part_says_so_in_one_sentence() -> None:
    page = make_kernel_page([])
    for command in ("peers", "text_steps", "switching", "kernels"):
        assert f"Not measured yet; `python -m benchmarks.{command} --add` does." in page
    assert page.count("Not measured yet") == 4


def test_steps_have_a_line_for_each_recipe_of_ours() -> None:
    page = make_kernel_page(steps())
    line = next(line for line in page.splitlines() if line.startswith("| random-dit | tr-dq-w8a8 |"))
    assert "| 2.50 (2.50–2.50) |" in line and "| 2.00 (2.00–2.00) |" in line
    assert "| 7.1 | 65 |" in line
    assert "rtn-w8a8" not in page
    assert "- random-dit on A CPU, 2 threads, 2026-11-21. Best other tool: peer-torchao-int8" in page


def test_text_has_a_table_of_its_own() -> None:
    own = [
        row("random-pixart-xl", "tr-dq-w4a8", name, value, "text")
        for name, value in (("known_text_ms", 90.0), ("text_share", 0.161))
    ]
    page = make_kernel_page([*own, *swaps()])
    assert "| random-pixart-xl, tr-dq-w4a8 | 90.0 | 16.1 |" in page
    assert "On A CPU, 2 threads; 25 runs, 2026-11-21." in page


def test_calls_and_swaps_show_the_last_measurement() -> None:
    page = make_kernel_page([*calls(), *swaps()])
    assert "**linear 512x1152x4608** on A CPU, 2 threads; copy 20 GB/s" in page
    assert "| float32 F.linear | 8000.0 (7900.0–8200.0) |  |" in page
    assert "9000" not in page
    assert "| product alone, int8 | 2500.0 | 68 |" in page
    assert "| random-dit, tr-dq-w8a8-4-groups | 1.10 (1.00–1.50) | 1.12 (1.00–1.50) |" in page


def test_they_stand_in_that_page_alone() -> None:
    rows = [*calls(), *swaps()]
    assert all(is_kernels(one) for one in rows)
    assert not any(is_kernels(one) for one in steps())
    for brief in (True, False):
        assert tables.make_tables(rows, brief=brief) == ""


def test_the_page_is_rewritten_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/results.md", "docs/kernels.md"):
        (tmp_path / page).write_text(f"before\n{tables.BEGIN}\n{tables.END}\nafter\n")
    pages = tables.rewritten(calls(), tmp_path)
    assert "product alone, int8" in pages[tmp_path / "docs" / "kernels.md"]
    assert "product alone" not in pages[tmp_path / "docs" / "results.md"]
