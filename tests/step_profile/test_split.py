"""Where a step's time goes: categories that add up, bounds from counted work, traces that can be read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.kernels.cases import make_input, make_stages, make_weight
from trdq_core.errors import StorageError
from trdq_core.kernels import cpu, native
from trdq_core.kernels.observing import Call, observed, peak_operations, timed_phases
from trdq_core.kernels.types import NO_STAGES, Epilogue, Prologue
from trdq_core.step_profile import CATEGORIES, Peaks, measured_peaks, roofline, split, split_step, trace_step
from trdq_core.step_profile.command import copy_trace, memory_of, shares_of, trace_file
from trdq_core.step_profile.split import category_of

needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason="no C++ kernels here")


@pytest.mark.parametrize(
    ("operator", "category"),
    [
        ("aten::addmm", "linears"),
        ("aten::_int_mm", "linears"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm", "norms_modulation"),
        ("aten::mul", "norms_modulation"),
        ("aten::gelu", "activations"),
        ("aten::round", "rotation_quantization"),
        ("trdq::quantize_activation", "rotation_quantization"),
        ("trdq::triton_transform", "rotation_quantization"),
        ("trdq::triton_fp8_linear", "linears"),
        ("trdq::linear_from_float", "linears"),
        ("aten::copy_", "rest"),
        ("aten::embedding", "rest"),
    ],
)
def test_operators_have_a_category(operator: str, category: str) -> None:
    assert category_of(operator) == category


def fused_step() -> None:
    """One of each kernel call, fused as in a block."""
    x, mods, weight = make_input(64, 256), torch.zeros(1, 256), make_weight(256, 256, 8)
    stages = make_stages(256, rotation=64, permute=True, second=32)
    norm = Prologue("norm", mods, mods, 1e-6)
    hidden = cpu.linear_from_float(x, NO_STAGES, weight, None, 8, True, prologue=norm)
    cpu.linear_from_float(hidden, stages, weight, None, 8, True, prologue=Prologue("gelu"), epilogue=Epilogue(x))
    q = hidden[None]
    cpu.attend(q, q, q, 4)


@needs_library
def test_the_split_adds_up_and_sees_inside_the_kernels() -> None:
    found = split_step(fused_step, steps=3)
    parts = found["parts_ms"]
    assert tuple(parts) == CATEGORIES
    named = [name for name in CATEGORIES if name != "rest"]
    assert all(parts[name] > 0 for name in named)
    assert parts["rest"] == pytest.approx(max(0.0, found["plain_ms"] - sum(parts[name] for name in named)), abs=1e-3)
    assert "plain step less the parts" in found["how"]
    products = found["products"]
    assert products["integer_operations"] == 2 * 2 * 64 * 256 * 256, "of both linears, not of the attention"
    assert 0 < products["ms"] <= parts["linears"] * 1.5


def test_a_step_of_torch_alone_is_split_by_operators() -> None:
    linear, x = nn.Linear(256, 256), torch.randn(512, 256)
    with torch.no_grad():
        parts = split_step(lambda: linear(functional.layer_norm(x, (256,))), steps=3)["parts_ms"]
    assert parts["linears"] > parts["norms_modulation"] > 0
    assert parts["attention"] == parts["rotation_quantization"] == 0


@needs_library
def test_what_measuring_costs_is_in_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are watched take 30 ms longer here; the parts and the rest still sum to the plain step of 10 ms."""

    class Slow(split.profile):
        def __enter__(self) -> split.profile:
            opened = super().__enter__()
            watched.append(True)
            return opened

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            watched.pop()

    watched: list[bool] = []
    monkeypatch.setattr(split, "profile", Slow)
    found = split_step(lambda: time.sleep(0.04 if watched else 0.01), steps=3)
    assert found["total_ms"] > 35
    assert 9 < found["plain_ms"] < 30
    assert sum(found["parts_ms"].values()) == pytest.approx(found["plain_ms"], abs=1e-3)


def test_shares_are_those_of_the_plain_step() -> None:
    found = {"parts_ms": {"rotation_quantization": 2.0}, "plain_ms": 40.0, "total_ms": 90.0,
             "products": {"integer_operations": 8 * 10**9, "ms": 16.0}}  # fmt: skip
    peaks = Peaks(1e9, 1e10, 1e12, 1)
    assert shares_of(found, peaks) == {"rotation_quantize_share": 0.05, "product_peak_share": 0.5}
    assert shares_of(found, peaks._replace(integer_operations_per_s=None))["product_peak_share"] is None
    found["products"] = {"integer_operations": 0, "ms": 0.0}
    assert shares_of(found, peaks)["product_peak_share"] is None


@needs_library
def test_time_outside_of_everything_is_the_rest() -> None:
    found = split_step(lambda: time.sleep(0.01), steps=2)
    assert found["parts_ms"]["rest"] > 8
    assert sum(value for name, value in found["parts_ms"].items() if name != "rest") < 1


@needs_library
def test_phases_are_timed_only_while_somebody_asks() -> None:
    with timed_phases() as phases:
        assert set(phases().values()) == {0.0}
        fused_step()
        assert all(value > 0 for value in phases().values())
    fused_step()
    with timed_phases() as phases:
        assert set(phases().values()) == {0.0}


@needs_library
def test_calls_are_seen_with_what_they_have_to_do() -> None:
    """Operations and bytes by hand for one linear and one attention; afterwards nothing is watched any more."""
    seen: list[Call] = []
    with observed(seen.append):
        fused_step()
    count = len(seen)
    fused_step()
    assert len(seen) == count == 3
    first, second, attention = (call.work for call in seen)
    assert first.name == "norm + quantize, linear W8 64x256x256"
    assert first.integer_operations == 2 * 64 * 256 * 256
    assert first.float_operations == 0
    assert first.bytes == 4 * 64 * 256 * 2 + 256 * 256 + 2 * 4 * 256
    assert second.name == "gelu + R64, permute, R32 + quantize, linear W8 64x256x256 + residual"
    assert second.float_operations == 64 * 256 * 2 * (64 + 32)
    assert second.bytes == first.bytes + 4 * 64 * 256
    assert attention.name == "attention float32 1x4, 64x64x64"
    assert attention.float_operations == 4 * 64 * 64 * 256


@needs_library
def test_roofline_rows_stand_beside_their_bound() -> None:
    peaks = Peaks(copy_bytes_per_s=1e9, float_operations_per_s=1e9, integer_operations_per_s=1e12, threads=1)
    rows = {row["op"].partition(",")[0]: row for row in roofline(fused_step, peaks, repeats=1)}
    attention = rows["attention float32 1x4"]
    assert attention["bound"] == "compute"
    assert attention["bound_ms"] == pytest.approx(1000 * attention["operations"] / 1e9, rel=1e-3)
    assert attention["share_of_bound"] == pytest.approx(attention["bound_ms"] / attention["ms"], rel=1e-2)
    plain = rows["norm + quantize"]
    assert plain["bound"] == "memory"
    assert plain["bound_ms"] == pytest.approx(1000 * plain["bytes"] / 1e9, rel=1e-3)
    assert all(row["calls"] == 1 and row["ms"] > 0 for row in rows.values())


def test_without_kernels_of_our_own_there_is_no_roofline() -> None:
    assert roofline(lambda: torch.ones(3) + 1, Peaks(1e9, None, None, 1)) == []


@needs_library
def test_peaks_are_measured() -> None:
    peaks = measured_peaks()
    assert peaks.copy_bytes_per_s > 1e8
    if native.path() != "portable":
        assert peaks.integer_operations_per_s > peaks.float_operations_per_s > 1e9
    with native.limited_to("portable"):
        assert peak_operations(0) is None


@needs_library
def test_a_trace_can_be_read_and_names_our_kernels(tmp_path: Path) -> None:
    trace_step(fused_step, tmp_path / "traces" / "step.json")
    names = {event.get("name") for event in json.loads((tmp_path / "traces" / "step.json").read_text())["traceEvents"]}
    assert "trdq: attention float32 1x4, 64x64x64" in names
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        trace_step(lambda: torch.ones(1), tmp_path / "file" / "step.json")


def test_a_stored_trace_is_copied_plain_or_packed(tmp_path: Path) -> None:
    """What a run keeps is packed; what somebody asks for is as its name says, in a folder that may not be there yet."""
    stored = tmp_path / "step.json.gz"
    trace_step(lambda: torch.ones(3) + 1, stored)
    copy_trace(stored, tmp_path / "new" / "step.json")
    assert json.loads((tmp_path / "new" / "step.json").read_text())["traceEvents"]
    copy_trace(stored, tmp_path / "step2.json.gz")
    assert (tmp_path / "step2.json.gz").read_bytes() == stored.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        copy_trace(stored, tmp_path / "file" / "step.json")


def test_trace_files_carry_the_recipe_where_there_are_several() -> None:
    assert trace_file("a/step.json", "fp", several=True) == Path("a/step-fp.json")
    assert trace_file("a/step", "fp", several=True) == Path("a/step-fp.json")
    assert trace_file("a/step.json", "fp", several=False) == Path("a/step.json")


def test_four_memory_numbers() -> None:
    row = {"resident_bytes": 3, "peak_rss_bytes": 9, "disk_bytes": 4}
    assert memory_of(row, {"resident_bytes": 12}) == {
        "weights_bytes": 3, "peak_rss_bytes": 9, "disk_bytes": 4, "full_precision_bytes": 12,
    }  # fmt: skip
