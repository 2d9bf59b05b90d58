"""A stored profile as the core writes it, for pages and figures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from studio.profile_plots import PARTS
from trdq_core.specs import RunSpec

PEAKS = {"copy_bytes_per_s": 1.7e10, "float_operations_per_s": 3.5e11, "integer_operations_per_s": 9.5e11, "threads": 2}

TRACE = b'{"traceEvents": [{"name": "trdq: linear", "ph": "X", "ts": 1, "dur": 2}]}'
TRACED = ("fp", "tr-dq-w8a8")


def call(op: str, share: float = 0.5) -> dict[str, Any]:
    """A row of a roofline."""
    return {
        "op": op, "calls": 12, "ms": 1.5, "operations": 600_000_000, "bytes": 4_500_000, "operations_per_byte": 133.3,
        "operations_per_s": 4e11, "bytes_per_s": 3e9, "bound": "compute", "bound_ms": 1.5 * share, "share_of_bound": share,
    }  # fmt: skip


def row(kind: str, scale: float, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """A recipe's row of the report."""
    split = {"parts_ms": {name: scale * (i + 1) for i, name in enumerate(PARTS)}, "total_ms": 21 * scale,
             "plain_ms": 20 * scale, "steps": 5}  # fmt: skip
    memory = {"weights_bytes": 2**20, "peak_rss_bytes": 2**29, "disk_bytes": 0, "full_precision_bytes": 2**22}
    return {
        "kind": kind, "label": "FP32", "simulated": False, "kernels": {}, "split": split, "roofline": calls, "memory": memory,
        "denoise_ms": 400 * scale, "step_ms": {"median": 20 * scale, "p10": 1, "p90": 2, "n": 5},
    }  # fmt: skip


def report() -> dict[str, Any]:
    """The report of a profile of three recipes, one of them simulated."""
    simulated = {"kind": "quantized", "simulated": True, "step_ms": None, "kernels": {"simulated": 9}}
    faster = row("quantized", 0.4, [call("attention float32 2x6, 256x256x64"), call("linear <W8>", 0.78)])
    return {
        "command": "profile", "model": "pocket-image", "machine": {"cpu": "A CPU", "threads": 2}, "peaks": PEAKS,
        "encode_ms": 12.5, "decode_ms": None, "reference": {"label": "FP32"},
        "recipes": {
            "fp": row("reference", 1.0, []),
            "tr-dq-w8a8": faster | {"swap_ms": {"median": 0.2, "p10": 0.1, "p90": 0.3, "n": 3}},
            "svdquant-w4a4": simulated,
        },
    }  # fmt: skip


def store(folder: Path, name: str = "20261121-100000-profile-ab12") -> str:
    """Write it as a run of the fake core; returns the run's id."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "state.json").write_text(json.dumps({"state": "done"}))
    (run / "spec.json").write_text(RunSpec(command="profile", model="pocket-image").to_json())
    written = report()
    (run / "traces").mkdir()
    for recipe in TRACED:
        written["recipes"][recipe]["trace_file"] = f"traces/{recipe}.json.gz"
        (run / "traces" / f"{recipe}.json.gz").write_bytes(gzip.compress(TRACE))
    (run / "report.json").write_text(json.dumps(written))
    return name
