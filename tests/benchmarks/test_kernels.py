"""The timings of the CPU kernels: what is compared, how bounds are counted, and the rows they become."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kernels
from benchmarks.kernel_cases import Case, attention_cases, linear_cases
from benchmarks.kernel_tables import make_kernel_page
from benchmarks.tables import make_tables, read_results
from trdq_core.kernels import native
from trdq_core.kernels.observing import Work
from trdq_core.step_profile import Peaks

PEAKS = Peaks(1e9, 1e10, 1e11, 1)
needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the C++ kernels")


def test_a_bound_is_the_longer_of_bytes_and_operations() -> None:
    call = Case("a", "k", lambda: None, Work("a", 10**6, 10**5, 10**3))
    assert kernels.bound_us(call, PEAKS) == pytest.approx(20)  # 10 µs in each unit
    assert kernels.bound_us(call._replace(work=Work("a", 10**6, 0, 10**5)), PEAKS) == pytest.approx(100)
    assert kernels.bound_us(call._replace(work=None), PEAKS) is None
    assert kernels.bound_us(call, PEAKS._replace(integer_operations_per_s=None)) is None


@needs_library
def test_the_work_of_a_linear_is_counted_from_its_kernel_calls() -> None:
    cases = {case.name: case for case in linear_cases(16, 128, 64)}
    assert cases["int8"].work is not None
    assert cases["int8"].work.integer_operations == 2 * 16 * 128 * 64
    assert cases["scale, Hadamard, int8"].work.float_operations == 16 * 128 * 7  # log2 of blocks of 128
    assert cases["quantize alone"].work.integer_operations == 0
    ours = attention_cases(16, 128)[1]
    assert ours.work is not None
    assert ours.work.float_operations == 4 * 2 * 8 * 8 * 128


@needs_library
def test_the_command_times_every_call_and_keeps_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.csv"
    kernels.main(["--shapes", "16x128x256", "--rounds", "2", "--add", "--out", str(out)])
    rows = read_results(out)
    names = [case.name for case in linear_cases(16, 128, 256)]
    assert {row["recipe"] for row in rows if "linear" in row["model"]} == set(names)
    assert all(float(row["value"]) > 0 for row in rows)
    first = [row for row in rows if row["recipe"] == names[0] and row["metric"] == "call_speed"]
    assert [float(row["value"]) for row in first] == [1.0]
    assert "of bound" in capsys.readouterr().out
    assert "| scale, Hadamard, int8 |" in make_kernel_page(rows)
    assert make_tables(rows, brief=True) == make_tables(rows, brief=False) == "", "they have a page of their own"
