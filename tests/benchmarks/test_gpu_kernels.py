"""The GPU benchmark where there is no GPU: it refuses in one sentence, and what it does with timings is right."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_kernels, gpu_step
from benchmarks.tables import COLUMNS, add_rows, make_tables, read_results
from trdq_core import branches
from trdq_core.kernels import triton_gpu


def test_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, exit code 1, nothing written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_kernels.main(["--add"]) == 1
    captured = capsys.readouterr()
    assert captured.err.strip() == "These measurements need an NVIDIA GPU, and torch sees none; nothing was measured."
    assert captured.out == ""


def test_the_bound_is_the_longer_of_bytes_and_operations() -> None:
    """By hand: 1 GB at 1 TB/s is 1000 us, 4 TOP at 1 POP/s is 4000 us."""
    peaks = gpu_kernels.Peaks(copy=1e12, int8=1e15, bf16=5e14)
    times = [8000.0, 9000.0, 7000.0]
    case = gpu_kernels.Case("a", lambda: None, bytes=1e9, operations=4e12)
    timing = gpu_kernels.summary(case, times, peaks)
    assert (timing.median, timing.p10, timing.p90, timing.rounds) == (8000.0, 7000.0, 9000.0, 3)
    assert timing.bound_share == pytest.approx(0.5)
    assert gpu_kernels.summary(case._replace(unit="bf16"), times, peaks).bound_share == pytest.approx(1.0)
    assert gpu_kernels.summary(case._replace(operations=0), times, peaks).bound_share == pytest.approx(1 / 8)


def test_rows_fit_the_results_file(tmp_path) -> None:
    """Numbers and failures alike become rows with the file's columns."""
    timings = [gpu_kernels.Timing("works", 10, 9, 12, 20, 0.5), gpu_kernels.Timing("fails", failure="no kernel")]
    rows = gpu_kernels.rows_of("kernels 1x2x3", timings, "note")
    add_rows(rows, tmp_path / "results.csv")
    found = read_results(tmp_path / "results.csv")
    assert all(set(row) == set(COLUMNS) for row in found)
    assert [(row["recipe"], row["metric"], row["value"]) for row in found] == [
        ("works", "call_us", "10"),
        ("works", "bound_share", "0.5"),
        ("fails", "call_us", ""),
    ]
    assert found[-1]["note"] == "failed: no kernel"
    assert "| works | 10.0 (9.0–12.0) | 50 |" in make_tables(found, brief=False)
    assert make_tables(found, brief=True) == ""


def test_step_rows_compare_round_by_round() -> None:
    """Speed is the median of ratios inside a round; bytes are those of the model's tensors."""
    models = {"bf16": torch.nn.Linear(8, 8), "w8": torch.nn.Linear(8, 4)}
    times = {"bf16": [2000.0, 4000.0, 6000.0], "w8": [1000.0, 1000.0, 2000.0], "w8, compiled": [500.0, 500.0, 500.0]}
    rows = gpu_step.step_rows(gpu_step.Size(layers=1), models, times, {"tr-dq": "failed: reason"})
    numbers = {(row["recipe"], row["metric"]): row["value"] for row in rows}
    assert numbers["bf16", "speedup"] == 1
    assert numbers["w8", "speedup"] == 3
    assert numbers["w8, compiled", "step_ms"] == 0.5
    assert numbers["w8", "weight_bytes"] == 4 * (8 * 4 + 4)
    assert numbers["tr-dq", "step_ms"] == ""


@pytest.mark.slow
def test_the_models_of_the_step_run_in_the_interpreter(triton_or_skip: None) -> None:
    """Every recipe converts for the Triton backend and its denoiser gives finite numbers near the original's."""
    size = gpu_step.Size(layers=1, heads=2, head_width=32, side=2, caption_channels=16, caption_tokens=3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = gpu_step.denoisers(size, device, torch.float32, "triton")
    call = gpu_step.inputs(size, device, torch.float32)
    with torch.no_grad(), branches.joint():
        outputs = {name: model(**call, return_dict=False)[0] for name, model in models.items()}
    for name, output in outputs.items():
        error = float((output - outputs["bf16"]).norm() / outputs["bf16"].norm())
        assert error < (0.5 if "shared" in name or "w4" in name else 0.1), (name, error)
    assert gpu_step.tensor_bytes(models["vidit-q-w4a8"]) < gpu_step.tensor_bytes(models["vidit-q-w8a8"])


@pytest.fixture
def triton_or_skip() -> None:
    """A skip with the reason where the Triton kernels cannot run, not even in the interpreter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton_gpu.unavailable_reason(device)
    if reason is not None:
        pytest.skip(reason)
