"""The generated part of docs/kernels.md: whole steps, single calls beside their bounds, and what switching sets costs.

From rows of benchmarks/results.csv that `benchmarks.peers`, `benchmarks.kernels` and `benchmarks.switching` add.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.peer_rows import Row
from benchmarks.peer_tables import COLUMNS, Column, by_metric, latest_runs, rivals_line, show

CALLS = "CPU kernels"  # what the model of such rows begins with
SWITCHING, TEXT = "switching", "text"  # a part of the note of such rows
OURS = "tr-dq"
STEP_COLUMNS = (
    "step_ms", "speedup", "speedup_compiled", "speedup_rival", "speedup_other_rival", "rotation_quantize_share",
    "product_peak_share", "transformed_layers", "file_share",
)  # fmt: skip
CALL_COLUMNS = {
    "call_us": Column("call µs", 1, ".1f", True),
    "call_speed": Column("against the first", 1, ".2f"),
    "bound_share": Column("of its bound %", 100, ".0f"),
}
SWITCH_COLUMNS = {
    "run_ms": Column("run ms", 1, ".0f", True),
    "swaps": Column("swaps a run", 1, ".0f"),
    "swap_ms": Column("one swap ms", 1, ".2f", True),
    "swap_share": Column("swaps, % of a run", 100, ".2f", True),
    "switch_share": Column("with slower steps after them, %", 100, ".2f", True),
}
TEXT_COLUMNS = {
    "known_text_ms": Column("step ms", 1, ".1f", True),
    "new_text_ms": Column("with a new text ms", 1, ".1f", True),
    "text_share": Column("saved, % of a step", 100, ".1f", True),
}


def is_kernels(row: Row) -> bool:
    """Whether a row of the results file is shown in docs/kernels.md alone."""
    return row["model"].startswith(CALLS) or any(_is(part, row) for part in (SWITCHING, TEXT))


def make_kernel_page(rows: Sequence[Row]) -> str:
    """Markdown for between the markers; a part without rows says which command would bring them."""
    parts = {
        "Whole steps": (_steps(rows), "benchmarks.peers"),
        "Text seen before": (_machines(rows, TEXT, TEXT_COLUMNS), "benchmarks.text_steps"),
        "Swaps of switched sets": (_machines(rows, SWITCHING, SWITCH_COLUMNS), "benchmarks.switching"),
        "Single calls": (_calls(rows), "benchmarks.kernels"),
    }
    return "\n\n".join(
        f"### {title}\n\n{text or f'Not measured yet; `python -m {command} --add` does.'}"
        for title, (text, command) in parts.items()
    )


def _is(part: str, row: Row) -> bool:
    return part in (own.strip() for own in row["note"].split(";"))


def _steps(rows: Iterable[Row]) -> str:
    """A line for each recipe of ours in the latest run of each model."""
    runs = [(own[0], by_metric(own)) for own in latest_runs(rows)]
    lines, notes = [], []
    for first, latest in runs:
        recipes = sorted({name for name, metric in latest if name.startswith(OURS) and metric == "step_ms"})
        for recipe in recipes:
            cells = [show(latest.get((recipe, name)), COLUMNS[name]) for name in STEP_COLUMNS]
            lines.append(f"| {first['model']} | {recipe} | {' | '.join(cells)} |")
        if recipes:
            place = f"{first['model']} on {first['device']}, {first['threads']} threads, {first['date']}."
            notes.append(f"- {place}{rivals_line(latest)}")
    if not lines:
        return ""
    titles = ["model", "recipe", *(COLUMNS[name].title for name in STEP_COLUMNS)]
    head = [f"| {' | '.join(titles)} |", "| --- | --- |" + " ---: |" * len(STEP_COLUMNS)]
    return "\n".join([*head, *lines, "", *notes])


def _calls(rows: Iterable[Row]) -> str:
    """A table for each shape and machine, calls down."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["model"].startswith(CALLS):
            groups.setdefault((row["model"], row["device"], row["threads"]), []).append(row)
    tables = []
    for (title, device, threads), own in groups.items():
        own = _newest(own)
        head = f"**{title.removeprefix(CALLS + ', ')}** on {device}, {threads} threads; {own[0]['note']}; measured"
        tables.append(f"{head} {own[0]['date']}, {own[0]['n']} rounds.\n\n{_table('call', own, CALL_COLUMNS)}")
    return "\n\n".join(tables)


def _machines(rows: Iterable[Row], part: str, columns: dict[str, Column]) -> str:
    """A table for each machine of the rows with such a part in their notes, models and recipes down."""
    groups: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in (row for row in rows if _is(part, row)):
        machine = groups.setdefault((row["device"], row["threads"]), {})
        machine.setdefault((row["model"], row["recipe"]), []).append(row)
    tables = []
    for (device, threads), kinds in groups.items():
        newest = {key: _newest(own) for key, own in kinds.items()}
        named = [{**row, "recipe": f"{model}, {recipe}"} for (model, recipe), own in newest.items() for row in own]
        settings = sorted({row["note"].split(";")[0] for row in named} - {part})
        days = sorted({row["date"] for row in named})
        counts = sorted({row["n"] for row in named})
        about = "; ".join(
            [f"On {device}, {threads} threads", *settings, f"{', '.join(counts)} runs, {', '.join(days)}."]
        )
        tables.append(f"{about}\n\n{_table('model, recipe', named, columns)}")
    return "\n\n".join(tables)


def _newest(rows: Sequence[Row]) -> list[Row]:
    """Those of the last measurement: of the latest day, and of that the last row of each number."""
    day = max(row["date"] for row in rows)
    return list(by_metric(row for row in rows if row["date"] == day).values())


def _table(title: str, rows: Sequence[Row], columns: dict[str, Column]) -> str:
    latest = by_metric(rows)
    shown = [name for name in columns if any(metric == name for _, metric in latest)]
    lines = [f"| {title} | {' | '.join(columns[name].title for name in shown)} |", "| --- |" + " ---: |" * len(shown)]
    for name in dict.fromkeys(row["recipe"] for row in rows):
        cells = (show(latest.get((name, metric)), columns[metric]) for metric in shown)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
