"""Readouts: what people or files wrote is escaped, numbers read well, simulated times stay grey."""

from __future__ import annotations

from typing import Any

import pytest

from studio.components import html, plan, words
from studio.context import Studio
from studio.jobs import Job
from studio.services.form import Form
from studio.state import Progress

EVIL = "<img src=x onerror=alert(1)>"


def test_foreign_text_is_escaped_everywhere() -> None:
    job = Job("a", EVIL, lambda say, cancelled: None)
    view = Progress(EVIL, stage="sample", label=EVIL, detail=EVIL, recipe=EVIL, warnings=[EVIL])
    facts = {
        "kernels": {EVIL: 3}, "rejected": [{"layer": EVIL}], "psnr": 1.0, "fp_weight_bytes": 8, "weight_bytes": 4,
    }  # fmt: skip
    texts = [
        html.notice(EVIL), html.progress(view, job), html.ended(view, job, EVIL), html.waiting(EVIL, 2, EVIL),
        html.empty_state(EVIL, EVIL), html.column_head("chosen", EVIL, EVIL), html.cards(facts),
        html.metrics_table([(EVIL, facts | {"kind": "quantized"})], None), html.idle(EVIL),
    ]  # fmt: skip
    assert all("<img" not in text and "&lt;img" in text for text in texts)


def test_plan_escapes_names_of_layers(studio: Studio, form: Form) -> None:
    view = studio.plans.of(form)
    layers = (view.plan.layers[0]._replace(layer=EVIL, reason=EVIL), *view.plan.layers[1:])
    changed = plan.PlanView(
        view.recipe, view.plan._replace(layers=layers, notes=(EVIL,)), *list(vars(view).values())[2:]
    )
    assert "<img" not in plan.table(changed) + plan.totals(changed) + plan.prices(changed)


def test_simulated_recipes_show_no_time() -> None:
    text = html.cards(
        {"simulated": True, "step_ms": {"median": 99.0, "n": 5}, "weight_bytes": 10, "fp_weight_bytes": 40}
    )
    assert "99" not in text
    assert "simulated in floating point" in text
    assert "theoretical; 0.25x" in text
    assert "tr-badge simulated" in text


def test_cards_state_spread_and_count() -> None:
    text = html.cards({"step_ms": {"median": 41.04, "p10": 40.0, "p90": 44.0, "n": 100}, "psnr": 31.2, "psnr_std": 2.0,
                       "ssim": 0.93, "ssim_std": 0.02, "n": 8, "kernels": {"int4 packed VNNI": 80}})  # fmt: skip
    for said in ("41.0 ms", "n = 100", "31.2 dB", "± 2.0, against FP, n = 8", "int4 packed VNNI · 80 layers"):
        assert said in text


def test_noise_floor_names_identical_pictures() -> None:
    assert "bit for bit the same" in html.noise_floor({"identical": True, "psnr": None})
    assert "PSNR 60.0 dB" in html.noise_floor({"identical": False, "psnr": 60.0, "ssim": 1.0})
    assert html.noise_floor(None) == ""


def test_waiting_says_the_place() -> None:
    assert "You are number 1 in line: 1 job is before yours." in html.waiting("Comparing", 1, "")
    assert "number 3 in line: 3 jobs are" in html.waiting("Comparing", 3, "calibration")


def test_progress_has_time_left_and_says_when_it_stops() -> None:
    job = Job("a", "x", lambda say, cancelled: None)
    view = Progress("Calibrating", stage="calibrate", done=5, total=20, eta_seconds=75.0, detail="blocks.3.attn1")
    text = html.progress(view, job)
    for said in ("5 / 20", "about 1 min 15 s left", "blocks.3.attn1", "width:25.0%"):
        assert said in text
    job.cancel()
    assert "stopping" in html.progress(view, job)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (84_900_000, "84.9 MB"), (2.5e9, "2.5 GB"), (None, "–")],
)
def test_sizes(value: Any, text: str) -> None:
    assert words.size(value) == text


def test_durations() -> None:
    assert [words.duration(s) for s in (0.4, 59, 75, 7500, None)] == ["0 s", "59 s", "1 min 15 s", "2 h 5 min", ""]


def test_difference_scale_follows_the_gain() -> None:
    assert "255 of 255" in html.difference_legend(1)
    assert "16 of 255" in html.difference_legend(16)
