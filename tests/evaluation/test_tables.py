"""Rows of an evaluation as tables: sections by bits, best first, failures last, sentences for a terminal."""

from __future__ import annotations

from typing import Any

from trdq_core import terminal
from trdq_core.evaluation import tables


def row(bits: str, sqnr: float | None, **others: Any) -> dict[str, Any]:
    return {"kind": "quantized", "bits": bits, "final_latent_sqnr_db": sqnr, "simulated": False, **others}


ROWS = {
    "fp": {"kind": "reference", "label": "FP32", "effective_bits": 32.0, "packed_bits": 32.0},
    "fp-again": {"kind": "noise_floor", "identical": True, "ssim": 1.0},
    "rtn-w4a4": row("W4A4", 11.0, final_latent_sqnr_db_se=0.25),
    "mine": row("mixed", 20.0),
    "best-w4a4": row("W4A4", 15.0, simulated=True, encoder_kid=0.0123, gmsd=0.0456789),
    "rtn-w8a8": row("W8A8", 40.0, psnr=50.0, psnr_se=1.0),
    "bad-w8a8": {"kind": "failed", "bits": "W8A8", "error": "it cannot be done."},
}
REPORT = {"command": "evaluate", "model": "m", "recipes": ROWS, "evaluation": {"prompts": 2, "seeds": 3}}


def test_sections_go_from_many_bits_to_few_and_best_first() -> None:
    found = {section.title: section.recipes for section in tables.sections(ROWS)}
    assert list(found) == ["reference", "W8A8", "W4A4", "mixed", "failed"]
    assert found["W4A4"] == ("best-w4a4", "rtn-w4a4")
    assert found["reference"] == ("fp", "fp-again")
    assert found["failed"] == ("bad-w8a8",)


def test_cells_say_what_is_simulated_missing_or_identical() -> None:
    best = dict(zip(tables.HEADER, tables.cells("best-w4a4", ROWS["best-w4a4"]), strict=True))
    assert (best["arithmetic"], best["KID x1000"], best["GMSD"], best["PSNR dB"]) == (
        "simulated",
        "12.30",
        "0.0457",
        "-",
    )
    floor = dict(zip(tables.HEADER, tables.cells("fp-again", ROWS["fp-again"]), strict=True))
    assert (floor["SQNR dB"], floor["SSIM"]) == ("identical", "1.0000")
    rtn = dict(zip(tables.HEADER, tables.cells("rtn-w4a4", ROWS["rtn-w4a4"]), strict=True))
    assert rtn["SQNR dB"] == "11.00 ± 0.25"


def test_the_terminal_shows_every_section() -> None:
    shown = terminal.report_text(REPORT)
    assert "bad-w8a8: it cannot be done." in shown
    assert shown.index("best-w4a4") < shown.index("rtn-w4a4")
    assert "± is one standard error over prompts" in shown


def test_markdown_and_csv_hold_every_recipe() -> None:
    text, lines = tables.markdown(REPORT), tables.csv_text(REPORT).splitlines()
    assert "2 prompts, 3 seeds each" in text
    assert len(lines) == 1 + len(ROWS)
    assert "it cannot be done." in lines[-1]
    assert all(name in text for name in ROWS)
