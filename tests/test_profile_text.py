"""The profile of a run in words."""

from __future__ import annotations

from trdq_core import profile_text
from trdq_core.terminal import report_text

PARTS = {name: 1.25 for name in profile_text.PARTS}
ROW = {
    "op": "attention float32 2x6, 256x256x64", "calls": 12, "ms": 1.5, "bound_ms": 0.75, "bound": "compute",
    "share_of_bound": 0.5,
}  # fmt: skip
REPORT = {
    "command": "profile", "model": "tiny", "machine": {"cpu": "a CPU", "threads": 1}, "prompts": ["a"],
    "reference": {"label": "FP32"}, "encode_ms": 12.0, "decode_ms": None,
    "peaks": {"copy_bytes_per_s": 17e9, "float_operations_per_s": None, "integer_operations_per_s": 9.5e11, "threads": 1},
    "recipes": {
        "fp": {"kind": "reference", "denoise_ms": 100.0, "split": {"parts_ms": PARTS, "total_ms": 8.0, "plain_ms": 7.5},
               "roofline": []},
        "tr-dq-w8a8": {"denoise_ms": 40.0, "split": {"parts_ms": PARTS, "total_ms": 8.0, "plain_ms": 7.5},
                       "roofline": [ROW] * 20, "swap_ms": {"median": 0.2, "p10": 0.1, "p90": 0.3, "n": 3}},
        "odd-w3a3": {"denoise_ms": None, "simulated": True},
    },
}  # fmt: skip


def test_rows_for_what_was_profiled() -> None:
    header, rows = profile_text.split_rows(REPORT["recipes"])
    assert [row[0] for row in rows] == ["fp", "tr-dq-w8a8"]
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][1:] == ("1.2",) * 6 + ("7.5", "8.0")


def test_calls_beside_their_bound() -> None:
    header, rows = profile_text.call_rows(REPORT["recipes"]["tr-dq-w8a8"])
    assert len(rows) == profile_text.SHOWN_CALLS
    assert rows[0] == ("attention float32 2x6, 256x256x64", "12", "1.500", "0.750", "compute", "50 %")
    assert len(header) == len(rows[0])


def test_lines_on_the_run_and_the_swaps() -> None:
    line = profile_text.run_line(REPORT)
    assert "decoder none" in line
    assert "fp 100, tr-dq-w8a8 40" in line
    assert "copy 17.0 GB/s, int8 950 G operations/s" in line
    assert profile_text.swap_line(REPORT) == ("swaps of switched sets: tr-dq-w8a8 3 x 0.20 ms, 1.5 % of a run")
    assert profile_text.swap_line({"recipes": {"fp": {"denoise_ms": 1.0}}}) is None


def test_the_report_ends_with_the_profile() -> None:
    text = report_text(REPORT)
    for words in ("rotate+quantize", "kernel call", "of bound", "measured peaks", "swaps of switched sets"):
        assert words in text
