"""Tables of evaluations, one for each bit-width and one for ablations, from rows of benchmarks/results.csv.

A row's note says what it is, with semicolons between: how it was sampled, "evaluation", "bits W4A8", and where they hold
"simulated" and "ablation". `low` and `high` are one standard error over prompts below and above the mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.leads import GAIN, make_lead_table

MARK, ABLATION = "evaluation", "ablation"

Row = dict[str, str]


class Column(NamedTuple):
    """One metric: title, factor on the stored value, format of the number, which end is best (1, -1, 0 for neither)."""

    title: str
    factor: float
    form: str
    best: int


COLUMNS = {
    "effective_bits": Column("bits a weight", 1, ".2f", 0),
    "packed_bits": Column("packed", 1, ".2f", 0),
    "final_latent_sqnr_db": Column("latent SQNR dB", 1, ".2f", 1),
    GAIN: Column("less or more than its base", 1, "+.2f", 0),
    "psnr": Column("PSNR dB", 1, ".2f", 1),
    "ssim": Column("SSIM", 1, ".4f", 1),
    "encoder_feature_distance": Column("encoder feature distance", 1, ".3g", -1),
    "gmsd": Column("GMSD", 1, ".3g", -1),
    "encoder_kid": Column("encoder KID x1000", 1000, ".2f", -1),
    "temporal_error_mean": Column("temporal error", 1, ".2f", -1),
    "motion_ratio_mean": Column("motion", 1, ".3f", 0),
    "fit_seconds": Column("fit s", 1, ".1f", 0),
}
WITH_ERROR = ("final_latent_sqnr_db", "psnr", GAIN)


def rows_from_evaluation(report: Mapping[str, Any], head: Mapping[str, Any], *, tag: str = "") -> list[Row]:
    """The numbers of an evaluation as rows of the results file; failed recipes and the reference have none."""
    spec, about = report["spec"], report["evaluation"]
    how = (
        f"{spec['steps']} steps, guidance {spec['guidance']}, first seed {spec['seed']}, "
        f"{about['prompts']} prompts, {about['seeds']} seeds each"
    )
    rows = []
    for recipe, facts in report["recipes"].items():
        if facts["kind"] not in ("quantized", "shared", "peer"):
            continue
        parts = [
            how,
            MARK,
            f"bits {facts['bits']}",
            *(["simulated"] if facts["simulated"] else []),
            *([tag] if tag else []),
        ]
        for metric in COLUMNS:
            if facts.get(metric) is None:
                continue
            value, error = facts[metric], facts.get(f"{metric.removesuffix('_mean')}_se")
            low, high = ("", "") if error is None else (f"{value - error:.7g}", f"{value + error:.7g}")
            numbers = {"metric": metric, "value": f"{value:.7g}", "low": low, "high": high, "n": facts["n"]}
            row = {**head, "recipe": recipe, **numbers, "note": "; ".join(parts)}
            rows.append({key: str(cell) for key, cell in row.items()})
    return rows


def is_evaluation(row: Row) -> bool:
    """Whether a row of the results file came from an evaluation."""
    return MARK in _parts(row)


def make_evaluation_tables(rows: Iterable[Row]) -> str:
    """Markdown of all evaluation rows: for each model and machine one table a bit-width, then the lead of our recipes over
    published ones, then ablations.
    """
    groups: dict[tuple[str, str, str, bool, str], list[Row]] = {}
    for row in filter(is_evaluation, rows):
        ablation = ABLATION in _parts(row)
        key = (
            row["model"],
            row["device"],
            row["threads"],
            ablation,
            f"{ABLATION} at {_bits(row)}" if ablation else _bits(row),
        )
        groups.setdefault(key, []).append(row)
    ordered = sorted(groups, key=lambda key: (key[:3], key[3], [-width for width in _widths(key[4])] or [0]))
    machines = list(dict.fromkeys(key[:3] for key in ordered))
    found = []
    for machine in machines:
        plain, ablated = ([key for key in ordered if key[:4] == (*machine, kind)] for kind in (False, True))
        found += [_table(key[4], groups[key]) for key in plain]
        found.append(make_lead_table({key[4]: _latest(groups[key]) for key in plain}))
        found += [_table(key[4], groups[key]) for key in ablated]
    return "\n\n".join(filter(None, found))


def _parts(row: Row) -> list[str]:
    return [part.strip() for part in row["note"].split(";")]


def _bits(row: Row) -> str:
    return next((part.removeprefix("bits ") for part in _parts(row) if part.startswith("bits ")), "mixed")


def _widths(label: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", label)]


def _table(title: str, rows: Sequence[Row]) -> str:
    """One table, the latest measurement of each number, best latent SQNR first, the best of each column in bold."""
    latest = _latest(rows)
    shown = [name for name in COLUMNS if any(metric == name for _, metric in latest)]
    names = sorted(
        {recipe for recipe, _ in latest}, key=lambda name: (-_value(latest.get((name, "final_latent_sqnr_db"))), name)
    )
    best = {name: _best(name, [latest.get((recipe, name)) for recipe in names]) for name in shown}
    lines = [
        f"**{rows[0]['model']}, {title}** on {rows[0]['device']}, {rows[0]['threads']} threads. {_how(latest.values())}",
        "",
        "| recipe | " + " | ".join(COLUMNS[name].title for name in shown) + " | arithmetic |",
        "| --- |" + " ---: |" * len(shown) + " --- |",
    ]
    for recipe in names:
        cells = [_cell(latest.get((recipe, name)), name, best[name]) for name in shown]
        simulated = any(name == recipe and "simulated" in _parts(row) for (name, _), row in latest.items())
        lines.append(f"| {recipe} | {' | '.join(cells)} | {'simulated' if simulated else 'real'} |")
    return "\n".join(lines)


def _latest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    latest: dict[tuple[str, str], Row] = {}
    for row in rows:
        before = latest.get((row["recipe"], row["metric"]))
        if before is None or row["date"] >= before["date"]:
            latest[row["recipe"], row["metric"]] = row
    return latest


def _how(rows: Iterable[Row]) -> str:
    rows = list(rows)
    settings = sorted({_parts(row)[0] for row in rows})
    dates = sorted({row["date"] for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(settings)}; measured {span}. ± is one standard error over prompts."


def _value(row: Row | None) -> float:
    return float(row["value"]) if row is not None else float("-inf")


def _best(name: str, rows: Sequence[Row | None]) -> float | None:
    values = [float(row["value"]) for row in rows if row is not None]
    direction = COLUMNS[name].best
    return max(values, key=lambda value: direction * value) if direction and len(values) > 1 else None


def _cell(row: Row | None, name: str, best: float | None) -> str:
    if row is None:
        return ""
    column, value = COLUMNS[name], float(row["value"])
    text = f"{value * column.factor:{column.form}}"
    if name in WITH_ERROR and row["high"]:
        text += f" ± {(float(row['high']) - value) * column.factor:{column.form.lstrip('+')}}"
    return f"**{text}**" if best is not None and value == best else text
