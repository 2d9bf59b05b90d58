"""Which chip runs what for real: the function, and the table in docs/gpu.md that prints it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from trdq_core.kernels import dispatch
from trdq_core.kernels.capabilities import Chip, capability_of, support

CHIPS = {"sm_75": (7, 5), "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0)}


@pytest.mark.parametrize(
    ("capability", "int8", "int4", "fp8", "quantize"),
    [
        (None, "simulated", "simulated", "simulated", "torch"),
        ((7, 0), "simulated", "simulated", "simulated", "torch"),
        ((7, 5), "torch", "torch", "simulated", "torch"),
        ((8, 0), "triton", "triton", "simulated", "triton"),
        ((8, 6), "triton", "triton", "simulated", "triton"),
        ((8, 9), "triton", "triton", "triton", "triton"),
        ((9, 0), "triton", "triton", "triton", "triton"),
        ((10, 0), "triton", "triton", "triton", "triton"),
        ((10, 3), "triton", "triton", "triton", "triton"),
        ((12, 0), "triton", "triton", "triton", "triton"),
    ],
)
def test_what_runs_where(capability: tuple[int, int] | None, int8: str, int4: str, fp8: str, quantize: str) -> None:
    """int8 from Turing on, Triton from Ampere on, fp8 from Ada on; nothing without a chip."""
    assert support(capability)[:4] == (int8, int4, fp8, quantize)


def test_the_table_in_the_docs_is_what_the_function_says(root: Path) -> None:
    """A row for each chip, and one for none."""
    text = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    rows = {row[0].split()[0].strip("`"): row[1:] for row in found}
    for name, capability in {**CHIPS, "none": None}.items():
        assert rows[name] == support(capability)[:4], f"docs/gpu.md, row {name}"


def test_a_cpu_has_no_capability() -> None:
    assert capability_of(torch.device("cpu")) is None


@pytest.mark.parametrize(("capability", "simulated"), [(None, True), ((7, 0), True), ((7, 5), False), ((9, 0), False)])
def test_torch_on_cuda_is_real_where_int8_units_are(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, simulated: bool
) -> None:
    """`_int_mm` needs Turing; older chips multiply in floating point, and are labelled so."""
    monkeypatch.setattr(dispatch.capabilities, "capability_of", lambda device: capability)
    assert dispatch.is_simulated("torch", "cuda") is simulated
    expected = "torch float32 (dequantized)" if simulated else "torch _int_mm"
    assert dispatch.kernel_name(8, 8, "torch", "cuda") == expected


def test_triton_names_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 bits run in the container of 4, and the interpreter is no real kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.kernel_name(8, 6, "triton", "cuda") == "int8 Triton, 6-bit levels"
    assert dispatch.kernel_name(4, 8, "triton", "cuda") == "int4 packed Triton"
    assert dispatch.is_simulated("triton", "cuda") is False
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.is_simulated("triton", "cpu") is True
    assert "interpreted" in dispatch.kernel_name(8, 8, "triton", "cpu")


def test_chips_are_described() -> None:
    """The note on Blackwell Ultra, whose int8 units were cut."""
    assert "fraction" in support((10, 3)).note
    assert isinstance(support(None), Chip)
