"""The quality benchmark of sharing on a tiny model: its plans, its rows, and that identical pictures are not averaged in."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import sharing_quality, tables
from benchmarks.sharing_quality import Quality, Settings, rows_of
from trdq_core.specs import SharingSpec


def test_rows_hold_means_lowest_and_counted_savings() -> None:
    spec = SharingSpec(predicted_saving=0.05, across_saving=0.1)
    quality = Quality([40.0, math.inf, 36.0], [0.99, 1.0, 0.98])
    rows = {row["metric"]: row for row in rows_of("plan", "tiny", quality, spec, 0.02, Settings(prompts=3))}
    assert set(rows) <= set(tables.METRICS)
    assert (rows["psnr"]["value"], rows["lowest_psnr"]["value"]) == (38.0, 36.0)
    assert rows["attention_saving"]["value"] == pytest.approx(0.15)
    assert rows["work_saving"]["value"] == 0.02
    assert "1 of 3 pictures identical" in str(rows["psnr"]["note"])
    same = rows_of("plan", "tiny", Quality([math.inf], [1.0]), spec, 0.0, Settings(prompts=1))
    assert {"psnr", "lowest_psnr"}.isdisjoint(row["metric"] for row in same)
    text = tables.make_tables([{key: str(cell) for key, cell in row.items()} for row in rows.values()], brief=False)
    assert "| plan | 38.0 (35.2–40.8) | 36.0 | 0.990" in text
    assert "15.0 | 2.0 |" in text


def test_every_way_is_compared(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sharing_quality.run(str(tiny_folder), Settings(prompts=1, search_prompts=1, steps=3))
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    assert (
        len(names)
        == 1 + len(sharing_quality.THRESHOLDS) + len(sharing_quality.TARGETS_DB) + len(sharing_quality.ACROSS) + 2
    )
    assert {"published list", "threshold 0.1", "automatic, 35 dB"} <= set(names)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(names)
