"""The profile of a run as lines for a terminal: the split of a step, its kernel calls, the parts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # header and rows
PARTS = {
    "linears": "linears", "attention": "attention", "rotation_quantization": "rotate+quantize",
    "norms_modulation": "norms+mod.", "activations": "activation", "rest": "rest",
}  # fmt: skip
SHOWN_CALLS = 8  # of a recipe, those that take most of the step


def split_rows(recipes: Mapping[str, Mapping[str, Any]]) -> Table:
    """A header and a row for each profiled recipe: milliseconds of a plain step by what they went into."""
    rows: list[tuple[str, ...]] = []
    for name, facts in recipes.items():
        split = facts.get("split")
        if split:
            parts = [f"{split['parts_ms'][part]:.1f}" for part in PARTS]
            rows.append((name, *parts, f"{split['plain_ms']:.1f}", f"{split['total_ms']:.1f}"))
    return ("one step, ms", *PARTS.values(), "step", "profiled"), rows


def call_rows(facts: Mapping[str, Any]) -> Table:
    """A header and the kernel calls of one recipe, each beside its bound."""
    rows: list[tuple[str, ...]] = []
    for row in facts.get("roofline", ())[:SHOWN_CALLS]:
        share = f"{100 * row['share_of_bound']:.0f} %"
        rows.append((row["op"], str(row["calls"]), f"{row['ms']:.3f}", f"{row['bound_ms']:.3f}", row["bound"], share))
    return ("kernel call", "calls", "ms", "bound ms", "bound by", "of bound"), rows


def run_line(report: Mapping[str, Any]) -> str:
    """Text encoder, denoiser and decoder of one run, and what the machine does at most."""
    recipes = report["recipes"]
    denoise = ", ".join(f"{name} {f['denoise_ms']:.0f}" for name, f in recipes.items() if f.get("denoise_ms"))
    decoder = "none" if report.get("decode_ms") is None else f"{report['decode_ms']:.0f} ms"
    peaks = report["peaks"]
    limits = [f"copy {peaks['copy_bytes_per_s'] / 1e9:.1f} GB/s"]
    for key, words in (("float_operations_per_s", "float32"), ("integer_operations_per_s", "int8")):
        if peaks.get(key):
            limits.append(f"{words} {peaks[key] / 1e9:.0f} G operations/s")
    return (
        f"text encoder {report['encode_ms']:.0f} ms, denoiser of one run in ms: {denoise}, decoder {decoder}; "
        f"measured peaks: {', '.join(limits)}"
    )


def swap_line(report: Mapping[str, Any]) -> str | None:
    """What the swaps of switched sets cost, for the recipes that made some."""
    shown = []
    for name, facts in report["recipes"].items():
        swap, run = facts.get("swap_ms"), facts.get("denoise_ms")
        if swap and run:
            shown.append(
                f"{name} {swap['n']} x {swap['median']:.2f} ms, {100 * swap['n'] * swap['median'] / run:.1f} % of a run"
            )
    return f"swaps of switched sets: {'; '.join(shown)}" if shown else None
