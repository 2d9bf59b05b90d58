"""Tables and the progress bar, as text."""

from __future__ import annotations

import io

import pytest

from tests.fake_runs import REPORT
from trdq_core import terminal


def test_report_table_labels_what_is_simulated_and_identical() -> None:
    rows = {line.split()[0]: line for line in terminal.report_text(REPORT).splitlines() if line}
    assert "identical" in rows["fp-again"]
    assert "simulated" in rows["rtn-w4a4"]
    assert "0.150" in terminal.report_text(REPORT)
    assert "rejected by the do-no-harm gate: 1" in terminal.report_text(REPORT)
    assert "reused" in rows["calibration"]


def test_columns_without_a_number_are_left_out() -> None:
    facts = {"kind": "quantized", "weight_bytes": 1500, "fp_weight_bytes": 10000}
    header = terminal.report_text({"recipes": {"rtn-w4a8": facts}}).splitlines()[2]
    assert header.split() == ["recipe", "weights", "of", "FP32"]


def test_peaks_and_the_file_are_said_where_they_were_measured() -> None:
    facts = {
        "convert_peak_rss_bytes": 3 << 30,
        "peak_rss_bytes": 2 << 30,
        "file_bytes": 1 << 20,
        "bf16_file_bytes": 4 << 20,
    }
    lines = terminal.report_text({"recipes": {"fp": {}, "rtn-w8a8": facts}}).splitlines()
    said = (
        "peak memory 3.00 GiB while it was converted, 2.00 GiB while it sampled; 1.00 MiB in a file, 0.250 of 4.00 MiB"
    )
    assert f"rtn-w8a8: {said} in bfloat16" in lines
    assert not any(line.startswith("fp: peak") for line in lines)
    short = terminal.report_text({"recipes": {"rtn": {"convert_peak_rss_bytes": 1024}}})
    assert short.endswith("rtn: peak memory 1.00 KiB while it was converted")


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (15 * 2**20, "15.0 MiB"), (2**41, "2048.0 GiB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert terminal.size(count) == text


def test_sharing_is_said_in_lines() -> None:
    plan = {"blocks": [[0, 1], []], "predicted_error": 0.0123, "predicted_saving": 0.125}
    found = {"map_cosine": 0.99, "output_error": 0.05, "block_error": [0.0, 0.1], "plan": plan}
    text = terminal.report_text({"similarity": found, "recipes": {"rtn+sharing": {"sharing": plan}}})
    assert "block 1: output error 0.1000" in text and "frames" not in text
    assert "plan: shares blocks 0 1; none; predicted output error 0.0123, attention FLOPs saved 12.5 %" in text
    assert "rtn+sharing: shares blocks 0 1; none" in text
    temporal = {"map_cosine": 0.8, "output_error": 0.25, "block_error": [0.25]}
    text = terminal.report_text({"similarity": found | {"temporal": temporal}})
    assert "within frames, maps of both branches: mean cosine 0.9900, mean output error of sharing 0.0500" in text
    assert "across frames, maps of both branches: mean cosine 0.8000, mean output error of sharing 0.2500" in text
    assert "across frames, block 0: output error 0.2500" in text


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_lines_and_on_a_terminal_bars() -> None:
    events = [
        {"kind": "stage", "stage": "sample", "label": "Sampling rtn", "recipe": "rtn"},
        *(
            {"kind": "progress", "stage": "sample", "done": i, "total": 4, "detail": "owl", "recipe": "rtn"}
            for i in range(1, 5)
        ),
        {"kind": "done", "text": "finished"},
    ]
    live, plain = Terminal(), io.StringIO()
    for stream in (live, plain):
        with terminal.ProgressBar(stream) as bar:
            for event in events:
                bar(event)
    assert live.getvalue().startswith("Sampling rtn\n")
    assert "4/4" in live.getvalue()
    assert plain.getvalue() == "Sampling rtn\n"


def test_reuse_skipping_and_measured_psnr_are_said_in_lines() -> None:
    plan = {
        "blocks": [[0], []], "predicted_saving": 0.1, "predicted_error": 0.02, "across_steps": [[], [2, 3]],
        "across_error": 0.05, "across_saving": 0.125, "skip_unconditional_below": 250.0, "skipped_guidance": "held",
        "skipped_change": None, "skipped_saving": 0.1, "measured_psnr_db": 36.25, "measured_prompts": 4,
    }  # fmt: skip
    text = terminal.report_text({"recipes": {"fp+sharing": {"sharing": plan}}})
    assert "fp+sharing: reuses blocks none; 2 3 at every second step; predicted output error 0.0500" in text
    assert "attention FLOPs saved 12.5 %" in text
    assert "skips the unconditional branch below timestep 250 (guidance held)" in text
    assert "denoiser FLOPs saved 10.0 %" in text
    assert "the plan by itself, in full precision: lowest PSNR 36.2 dB over 4 prompts" in text
    same = terminal.report_text({"recipes": {"a": {"sharing": {**plan, "measured_psnr_db": None}}}})
    assert "pictures identical over 4 prompts" in same


def test_clips_have_columns_for_flicker_and_motion() -> None:
    row = {"kind": "quantized", "psnr": 30.0, "temporal_error_mean": 1.25, "motion_ratio_mean": 0.987}
    header, _, shown = terminal.report_text({"recipes": {"rtn-w4a8": row}}).splitlines()[2:5]
    assert header.split() == ["recipe", "PSNR", "dB", "temporal", "error", "motion"]
    assert shown.split() == ["rtn-w4a8", "30.00", "1.25", "0.987"]
