"""The tables of a profile: memory of each recipe, and its kernel calls beside their bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

NONE = "–"
MEMORY = {
    "weights_bytes": "weights in memory", "peak_rss_bytes": "peak of the process", "disk_bytes": "switched sets on disk",
    "full_precision_bytes": "full precision",
}  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text cells as an HTML table that scrolls by itself."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="tr-table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def parts_table(report: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Text encoder, denoiser, decoder and swaps of one run, the step, and the four memory numbers, a line a recipe."""
    header = ["recipe", "step", "text encoder", "denoiser", "decoder", "swaps", *MEMORY.values()]
    lines = []
    for title, facts in rows.items():
        memory = facts.get("memory") or {}
        swap = facts.get("swap_ms")
        lines.append(
            [
                title,
                _ms((facts.get("step_ms") or {}).get("median")),
                _ms(report.get("encode_ms")),
                _ms(facts.get("denoise_ms")),
                _ms(report.get("decode_ms")),
                f"{swap['n']} of {swap['median']:.2f} ms" if swap else NONE,
                *(_mib(memory.get(key)) for key in MEMORY),
            ]
        )
    return table(header, lines)


def calls_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each kind of kernel call of each recipe beside its bound; nothing where no kernel of ours ran."""
    header = ["recipe", "kernel call", "calls", "ms", "bound ms", "bound by", "of bound"]
    lines = [
        [title, row["op"], str(row["calls"]), f"{row['ms']:.3f}", f"{row['bound_ms']:.3f}", row["bound"],
         f"{100 * row['share_of_bound']:.0f} %"]
        for title, own in rows.items()
        for row in own
    ]  # fmt: skip
    return table(header, lines) if lines else ""


def trace_links(traces: Mapping[str, Path], publish: Callable[[Path], str]) -> str:
    """Links to the Chrome traces of a run's recipes, by their titles; nothing where there are none."""
    links = [
        f'<a href="{escape(publish(path))}" download="{escape(path.name)}">{escape(title)}</a>'
        for title, path in traces.items()
    ]
    said = "Chrome trace of one step, for chrome://tracing or ui.perfetto.dev"
    return f'<p class="tr-small">{said}: {" · ".join(links)}</p>' if links else ""


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f} ms"


def _mib(value: int | None) -> str:
    return NONE if value is None else f"{value / 2**20:.1f} MiB"
