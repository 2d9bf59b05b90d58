"""Tables that set recipes beside other tools in one run, from rows of benchmarks/results.csv; see peer_rows.

A table shows one run: the latest whole one of a model, machine and number of threads, that is one with the reference and at
least one tool. Numbers of different runs never stand in one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.peer_rows import COMPILED, FAILED, PEERS, REFERENCE, RUN, Row, is_rival

Latest = Mapping[tuple[str, str], Row]  # recipe and metric


class Column(NamedTuple):
    """One metric: title, factor on the stored value, format of the number, whether its spread, or its n as a total, is shown."""

    title: str
    factor: float
    form: str
    spread: bool = False
    total: bool = False


COLUMNS = {
    "psnr": Column("PSNR dB", 1, ".2f", True),
    "ssim": Column("SSIM", 1, ".4f"),
    "final_latent_sqnr_db": Column("latent SQNR dB", 1, ".2f"),
    "step_ms": Column("step ms", 1, ".1f", True),
    "speedup": Column("against FP32", 1, ".2f", True),
    "speedup_compiled": Column("against FP32 compiled", 1, ".2f", True),
    "speedup_rival": Column("against the best other tool", 1, ".2f", True),
    "speedup_other_rival": Column("against the best without OpenVINO", 1, ".2f", True),
    "rotation_quantize_share": Column("rotate and quantize, % of step", 100, ".1f"),
    "product_peak_share": Column("products, % of 8-bit peak", 100, ".0f"),
    "transformed_layers": Column("layers transformed", 1, ".0f", total=True),
    "weight_bytes": Column("weights MiB", 2**-20, ".2f"),
    "file_bytes": Column("file MiB", 2**-20, ".2f"),
    "file_share": Column("of bf16 file", 1, ".3f"),
    "calibration_seconds": Column("calibration s", 1, ".1f"),
    "fit_seconds": Column("fit s", 1, ".1f"),
}


def is_peers(row: Row) -> bool:
    """Whether a row of the results file belongs to a table of recipes beside other tools."""
    return PEERS in _parts(row)


def make_peer_tables(rows: Iterable[Row]) -> str:
    """Markdown: one table for each model and machine, fastest first, then what did not run and why."""
    return "\n\n".join(_table(members) for members in latest_runs(rows))


def latest_runs(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of the latest whole run of each model, machine and number of threads, in order of appearance."""
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in filter(is_peers, rows):
        runs = groups.setdefault((row["model"], row["device"], row["threads"]), {})
        runs.setdefault(_run(row), []).append(row)
    whole = ({run: own for run, own in runs.items() if _whole(own)} for runs in groups.values())
    return [runs[max(runs)] for runs in whole if runs]


def by_metric(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """The rows of one run by recipe and metric."""
    return {(row["recipe"], row["metric"]): row for row in rows}


def show(row: Row | None, column: Column) -> str:
    """One number as a table has it, empty where there is none."""
    if row is None:
        return ""
    text = _form(row["value"], column)
    if column.total:
        return f"{text} of {row['n']}"
    if column.spread and row["low"] and row["high"]:
        text += f" ({_form(row['low'], column)}–{_form(row['high'], column)})"
    return text


def rivals_line(latest: Latest) -> str:
    """Which tools the speedups over rivals are against."""
    times = {
        name: float(row["value"]) for (name, metric), row in latest.items() if metric == "step_ms" and is_rival(name)
    }
    others = {name: ms for name, ms in times.items() if not name.startswith("peer-openvino")}
    words = []
    if times:
        words.append(f"Best other tool: {min(times, key=lambda name: times[name])}")
    if others and len(others) < len(times):
        words.append(f"without OpenVINO: {min(others, key=lambda name: others[name])}")
    return f" {'; '.join(words)}; of those that quantize." if words else ""


def _parts(row: Row) -> list[str]:
    return [part.strip() for part in row["note"].split(";")]


def _run(row: Row) -> str:
    return next((part for part in _parts(row) if part.startswith(RUN)), "")


def _whole(rows: Sequence[Row]) -> bool:
    names = {row["recipe"] for row in rows}
    return REFERENCE in names and any(is_rival(name) or name == COMPILED for name in names)


def _table(rows: Sequence[Row]) -> str:
    """One table of a run; what failed in it stands below."""
    latest = by_metric(rows)
    failed = [row for (_, metric), row in latest.items() if metric == FAILED]
    shown = [name for name in COLUMNS if any(metric == name for _, metric in latest)]
    names = sorted({recipe for recipe, metric in latest if metric != FAILED}, key=lambda name: _time(latest, name))
    first = rows[0]
    lines = [
        f"**{first['model']}, other tools in the same run** on {first['device']}, {first['threads']} threads. "
        f"{_how(rows)}{rivals_line(latest)}",
        "",
        "| recipe or tool | "
        + " | ".join(COLUMNS[name].title for name in shown)
        + " | arithmetic (of tools: as seen) |",
        "| --- |" + " ---: |" * len(shown) + " --- |",
    ]
    for recipe in names:
        cells = [show(latest.get((recipe, name)), COLUMNS[name]) for name in shown]
        arithmetic = next(_parts(row)[-1] for (name, _), row in latest.items() if name == recipe)
        lines.append(f"| {recipe} | {' | '.join(cells)} | {arithmetic} |")
    if failed:
        lines += ["", "Did not run:", "", *(f"- {_parts(row)[-1].removeprefix(f'{FAILED}: ')}" for row in failed)]
    return "\n".join(lines)


def _time(latest: Latest, recipe: str) -> tuple[float, str]:
    row = latest.get((recipe, "step_ms"))
    return (float(row["value"]) if row is not None else float("inf"), recipe)


def _how(rows: Sequence[Row]) -> str:
    settings = sorted({_parts(row)[0] for row in rows})
    prompts = sorted({row["n"] for row in rows if row["metric"] == "psnr"})
    rounds = sorted({row["n"] for row in rows if row["metric"] == "step_ms"})
    words = [*settings, *(f"{n} prompts" for n in prompts), *(f"{n} rounds, interleaved" for n in rounds)]
    return (
        f"{'; '.join(words)}; measured {rows[0]['date']}. Times are medians with the 10th and 90th percentile, speeds medians "
        "of the rounds' ratios."
    )


def _form(value: str, column: Column) -> str:
    return f"{float(value) * column.factor:{column.form}}"
