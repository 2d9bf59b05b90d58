"""Tables that set recipes beside other tools in one run, from rows of benchmarks/results.csv.

A row's note says what it is, with semicolons between: how it was sampled, "peers", and the arithmetic that was seen to run,
or "failed" and the sentence that says why. Times have the 10th and 90th percentile in `low` and `high`, quality one
standard deviation over prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

PEERS, FAILED = "peers", "failed"
REFERENCE, NOISE_FLOOR, COMPILED = "fp", "noise_floor", "peer-torch-compile"

Row = dict[str, str]


class Column(NamedTuple):
    """One metric: title, factor on the stored value, format of the number, whether its spread is shown."""

    title: str
    factor: float
    form: str
    spread: bool = False


COLUMNS = {
    "psnr": Column("PSNR dB", 1, ".2f", True),
    "ssim": Column("SSIM", 1, ".4f"),
    "final_latent_sqnr_db": Column("latent SQNR dB", 1, ".2f"),
    "step_ms": Column("step ms", 1, ".1f", True),
    "speedup": Column("against FP32", 1, ".2f"),
    "speedup_compiled": Column("against FP32 compiled", 1, ".2f"),
    "weight_bytes": Column("weights MiB", 2**-20, ".2f"),
    "file_bytes": Column("file MiB", 2**-20, ".2f"),
    "calibration_seconds": Column("calibration s", 1, ".1f"),
    "fit_seconds": Column("fit s", 1, ".1f"),
}
SPREADS = {"psnr": "psnr_std", "ssim": "ssim_std"}


def rows_from_peers(report: Mapping[str, Any], head: Mapping[str, Any]) -> list[Row]:
    """The numbers of a compare or profile run as rows of the results file; a tool that failed is a row with its reason."""
    spec, recipes = report["spec"], report["recipes"]
    how = f"{spec['steps']} steps, guidance {spec['guidance']}, seed {spec['seed']}"
    rows = []
    for recipe, facts in recipes.items():
        if facts["kind"] == NOISE_FLOOR:
            continue
        if facts["kind"] == FAILED:
            note = "; ".join([how, PEERS, f"{FAILED}: {facts['error'].replace(';', ',')}"])
            cells: list[dict[str, object]] = [{"metric": FAILED, "value": "", "low": "", "high": "", "n": ""}]
        else:
            note = "; ".join([how, PEERS, _arithmetic(facts)])
            cells = _numbers(facts, recipes)
        rows += [
            {key: str(cell) for key, cell in {**head, "recipe": recipe, **one, "note": note}.items()} for one in cells
        ]
    return rows


def is_peers(row: Row) -> bool:
    """Whether a row of the results file belongs to a table of recipes beside other tools."""
    return PEERS in _parts(row)


def make_peer_tables(rows: Iterable[Row]) -> str:
    """Markdown: one table for each model and machine, fastest first, then what did not run and why."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in filter(is_peers, rows):
        groups.setdefault((row["model"], row["device"], row["threads"]), []).append(row)
    return "\n\n".join(_table(members) for members in groups.values())


def _arithmetic(facts: Mapping[str, Any]) -> str:
    """ "int8 VNNI x 80, simulated": the products that were seen to run, and how many of each."""
    words = [f"{kernel} x {count}".replace(";", ",") for kernel, count in (facts.get("kernels") or {}).items()]
    return ", ".join([*words, *(["simulated"] if facts.get("simulated") else [])])


def _numbers(facts: Mapping[str, Any], recipes: Mapping[str, Any]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name in COLUMNS:
        value = facts.get(name)
        if isinstance(value, Mapping):
            spread = {"value": value["median"], "low": value["p10"], "high": value["p90"], "n": value["n"]}
            found.append({"metric": name, **spread})
        elif value is not None:
            error = facts.get(SPREADS.get(name, ""))
            low, high = ("", "") if error is None else (round(value - error, 6), round(value + error, 6))
            found.append({"metric": name, "value": round(value, 6), "low": low, "high": high, "n": facts.get("n", "")})
    step = facts.get("step_ms")
    for name, other in (("speedup", REFERENCE), ("speedup_compiled", COMPILED)):
        baseline = (recipes.get(other) or {}).get("step_ms")
        if step and baseline:
            ratio = round(baseline["median"] / step["median"], 4)
            found.append({"metric": name, "value": ratio, "low": "", "high": "", "n": step["n"]})
    return found


def _parts(row: Row) -> list[str]:
    return [part.strip() for part in row["note"].split(";")]


def _table(rows: Sequence[Row]) -> str:
    """One table of the latest measurements; what failed the last time it was tried stands below it."""
    latest: dict[tuple[str, str], Row] = {}
    newest: dict[str, str] = {}
    for row in rows:
        newest[row["recipe"]] = max(newest.get(row["recipe"], ""), row["date"])
    for row in rows:
        if row["date"] == newest[row["recipe"]]:
            latest[row["recipe"], row["metric"]] = row
    failed = {recipe: row for (recipe, metric), row in latest.items() if metric == FAILED}
    shown = [name for name in COLUMNS if any(metric == name for _, metric in latest)]
    names = sorted({recipe for recipe, metric in latest if metric != FAILED}, key=lambda name: _time(latest, name))
    first = rows[0]
    lines = [
        f"**{first['model']}, other tools in the same run** on {first['device']}, {first['threads']} threads. {_how(latest)}",
        "",
        "| recipe or tool | " + " | ".join(COLUMNS[name].title for name in shown) + " | what was seen to run |",
        "| --- |" + " ---: |" * len(shown) + " --- |",
    ]
    for recipe in names:
        cells = [_cell(latest.get((recipe, name)), COLUMNS[name]) for name in shown]
        arithmetic = next(
            _parts(row)[2] for (name, metric), row in latest.items() if name == recipe and metric != FAILED
        )
        lines.append(f"| {recipe} | {' | '.join(cells)} | {arithmetic} |")
    if failed:
        sentences = (
            f"- {_parts(row)[2].removeprefix(f'{FAILED}: ')}" for recipe, row in failed.items() if recipe not in names
        )
        lines += ["", "Did not run:", "", *sentences]
    return "\n".join(lines)


def _time(latest: Mapping[tuple[str, str], Row], recipe: str) -> tuple[float, str]:
    row = latest.get((recipe, "step_ms"))
    return (float(row["value"]) if row is not None else float("inf"), recipe)


def _how(latest: Mapping[tuple[str, str], Row]) -> str:
    rows = list(latest.values())
    settings = sorted({_parts(row)[0] for row in rows})
    dates = sorted({row["date"] for row in rows})
    prompts = sorted({row["n"] for row in rows if row["metric"] == "psnr"})
    rounds = sorted({row["n"] for row in rows if row["metric"] == "step_ms"})
    words = [*settings, *(f"{n} prompts" for n in prompts), *(f"{n} rounds, interleaved" for n in rounds)]
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(words)}; measured {span}. Times are medians with the 10th and 90th percentile."


def _cell(row: Row | None, column: Column) -> str:
    if row is None:
        return ""
    text = _form(row["value"], column)
    if column.spread and row["low"] and row["high"]:
        text += f" ({_form(row['low'], column)}–{_form(row['high'], column)})"
    return text


def _form(value: str, column: Column) -> str:
    return f"{float(value) * column.factor:{column.form}}"
