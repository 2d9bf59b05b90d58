"""Result tables of README.md, docs/results.md and docs/kernels.md, generated from benchmarks/results.csv.

    python -m benchmarks.tables                             # rewrite the tables
    python -m benchmarks.tables --check                     # exit 1 if they are not what the file says
    python -m benchmarks.tables --add RUN/report.json       # take the results of runs into the file first
    python -m benchmarks.tables --add RUN/evaluation.json --tag ablation    # evaluations, into a table of ablations
    python -m benchmarks.tables --add RUN/report.json --tag peers           # recipes beside other tools, into their table

The file is long: one row for each number, with the date, machine and sample size it belongs to. Of several measurements of
one thing on one machine the tables show the latest; the file keeps them all.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evaluation_tables import ABLATION, is_evaluation, make_evaluation_tables, rows_from_evaluation
from benchmarks.kernel_tables import is_kernels, make_kernel_page
from benchmarks.leads import gain_rows
from benchmarks.peer_rows import PEERS, file_share, rows_from_peers, speedup
from benchmarks.peer_tables import is_peers, make_peer_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.csv"
COLUMNS = ("date", "device", "threads", "model", "recipe", "metric", "value", "low", "high", "n", "note")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
EMPTY = "Nothing has been measured yet; `make bench` measures on your machine."


class Metric(NamedTuple):
    """How one metric is shown: column title, factor on the stored value, digits, and whether README shows it."""

    title: str
    factor: float
    digits: int
    brief: bool


METRICS = {
    "psnr": Metric("PSNR dB", 1, 1, True),
    "lowest_psnr": Metric("lowest PSNR dB", 1, 1, True),
    "ssim": Metric("SSIM", 1, 3, False),
    "temporal_error_mean": Metric("temporal error", 1, 2, True),
    "motion_ratio_mean": Metric("motion", 1, 3, True),
    "mean_latent_sqnr_db": Metric("latent SQNR dB", 1, 1, True),
    "attention_saving": Metric("attention FLOPs saved %", 100, 1, True),
    "work_saving": Metric("denoiser FLOPs saved %", 100, 1, True),
    "step_ms": Metric("step ms", 1, 1, True),
    "speedup": Metric("speed", 1, 2, True),
    "rotation_quantize_share": Metric("rotate and quantize, % of step", 100, 1, False),
    "transformed_layers": Metric("layers transformed", 1, 0, True),
    "end_to_end_ms": Metric("whole run ms", 1, 0, False),
    "weight_bytes": Metric("weights MiB", 1 / 2**20, 2, True),
    "weight_share": Metric("of reference", 1, 3, True),
    "file_share": Metric("file of bf16 file", 1, 3, False),
    "effective_bits": Metric("bits a weight", 1, 2, False),
    "calibration_seconds": Metric("calibrate s", 1, 1, False),
    "fit_seconds": Metric("fit s", 1, 1, False),
    "peak_rss_bytes": Metric("peak memory MiB", 1 / 2**20, 0, False),
    "call_us": Metric("call µs", 1, 1, False),
    "call_speed": Metric("against the first", 1, 2, False),
    "bound_share": Metric("of its bound %", 100, 0, False),
}
CLIPS = (
    "PSNR and SSIM are means over frames; temporal error: RMS of (frame difference - the reference's), grey levels; motion: "
    "mean squared frame difference over the reference's."
)
SPREADS = {"psnr": "psnr_std", "ssim": "ssim_std"}

Row = dict[str, str]


def read_results(path: Path = RESULTS) -> list[Row]:
    """All rows of the results file; none if it is not there. ValueError if its columns are others."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name}: its columns are {reader.fieldnames}, expected {', '.join(COLUMNS)}.")
        return list(reader)


def add_rows(rows: Iterable[Mapping[str, object]], path: Path = RESULTS) -> None:
    """Append rows to the results file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def rows_from_report(report: Mapping[str, Any], *, tag: str = "") -> list[Row]:
    """The numbers of a run's report as rows of the results file; `tag` says which further table they belong to."""
    machine, spec = report.get("machine") or {}, report.get("spec") or {}
    head = {
        "date": str(report.get("created", ""))[:10],
        "device": machine.get("gpu") or machine.get("cpu") or "",
        "threads": machine.get("threads", ""),
        "model": report.get("model", ""),
    }
    if report.get("command") == "evaluate":
        return rows_from_evaluation(report, head, tag=tag)
    if tag == PEERS:
        return rows_from_peers(report, head)
    setting = f"{spec.get('steps')} steps, guidance {spec.get('guidance')}, seed {spec.get('seed')}"
    baseline = report["recipes"].get("fp") or {}
    rows = []
    for recipe, facts in report["recipes"].items():
        for name, value, low, high, n in _numbers(facts, baseline):
            note = "; ".join([setting, *(["simulated"] if facts.get("simulated") else [])])
            numbers = {"metric": name, "value": value, "low": low, "high": high, "n": n}
            rows.append({key: str(cell) for key, cell in {**head, "recipe": recipe, **numbers, "note": note}.items()})
    return rows


def _numbers(
    facts: Mapping[str, Any], baseline: Mapping[str, Any]
) -> Iterable[tuple[str, object, object, object, object]]:
    """(metric, value, low, high, n) of one recipe; spreads are one standard deviation for quality, p10 and p90 for times."""
    for name in METRICS:
        value = facts.get(name)
        if isinstance(value, Mapping):
            yield name, value["median"], value["p10"], value["p90"], value["n"]
        elif value is not None:
            spread = facts.get(SPREADS.get(name, ""))
            low, high = ("", "") if spread is None else (round(value - spread, 6), round(value + spread, 6))
            yield name, round(value, 6), low, high, facts.get("n", "")
    if (found := speedup(facts, baseline)) is not None:
        yield "speedup", found["value"], found["low"], found["high"], found["n"]
    if facts.get("quantized_layers"):
        yield "transformed_layers", facts["transformed_layers"], "", "", facts["quantized_layers"]
    if (share := file_share(facts)) is not None:
        yield "file_share", share, "", "", ""
    if facts.get("weight_bytes") and facts.get("fp_weight_bytes"):
        yield "weight_share", round(facts["weight_bytes"] / facts["fp_weight_bytes"], 5), "", "", ""


def make_tables(rows: Sequence[Row], *, brief: bool) -> str:
    """Markdown: one table for each model and machine, recipes down, metrics across, with how it was measured above it.

    The long tables end with those of recipes beside other tools, and of evaluations.
    """
    if not rows:
        return EMPTY
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if not is_evaluation(row) and not is_peers(row) and not is_kernels(row):
            groups.setdefault((row["model"], row["device"], row["threads"]), []).append(row)
    found = [_table(key, members, brief=brief) for key, members in groups.items() if not brief or _in_brief(members)]
    further = [] if brief else [make_peer_tables(rows), make_evaluation_tables(rows)]
    return "\n\n".join([*found, *filter(None, further)])


def _in_brief(rows: Iterable[Row]) -> bool:
    """Whether the short tables show anything of these rows; those of single operators stay out of them."""
    return any(row["metric"] in METRICS and METRICS[row["metric"]].brief for row in rows)


def _table(key: tuple[str, str, str], rows: Sequence[Row], *, brief: bool) -> str:
    model, device, threads = key
    latest: dict[tuple[str, str], Row] = {}
    for row in rows:
        before = latest.get((row["recipe"], row["metric"]))
        if before is None or row["date"] >= before["date"]:
            latest[row["recipe"], row["metric"]] = row
    shown = [
        name for name in METRICS if any(metric == name for _, metric in latest) and (METRICS[name].brief or not brief)
    ]
    recipes = sorted(dict.fromkeys(recipe for recipe, _ in latest), key=_bits)
    lines = [
        f"**{model}** on {device}, {threads} threads. {_how(latest.values())}",
        "",
        "| recipe | " + " | ".join(METRICS[name].title for name in shown) + " |",
        "| --- |" + " ---: |" * len(shown),
    ]
    for recipe in recipes:
        cells = [_cell(latest.get((recipe, name)), METRICS[name], brief=brief) for name in shown]
        lines.append(f"| {recipe}{_mark(recipe, latest)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bits(recipe: str) -> tuple[int, int]:
    """Sorts recipes with more bits first, and what has none in its name before them."""
    found = re.search(r"-w(\d+)a(\d+)", recipe)
    return (-int(found[1]), -int(found[2])) if found else (-32, -32)


def _how(rows: Iterable[Row]) -> str:
    """One line above a table: settings, dates and what the numbers in brackets are."""
    rows = list(rows)
    settings = sorted({row["note"].split(";")[0].strip() for row in rows} - {""})
    dates = sorted({row["date"] for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    counts = sorted({row["n"] for row in rows if row["metric"] == "psnr" and row["n"]})
    pictures = f"; {', '.join(counts)} prompts" if counts else ""
    clips = f" {CLIPS}" if any(row["metric"] == "temporal_error_mean" for row in rows) else ""
    return f"{'; '.join(settings)}{pictures}; measured {span}. Times are medians.{clips}"


def _mark(recipe: str, latest: Mapping[tuple[str, str], Row]) -> str:
    simulated = any(name == recipe and "simulated" in row["note"] for (name, _), row in latest.items())
    return " (simulated)" if simulated else ""


def _cell(row: Row | None, metric: Metric, *, brief: bool) -> str:
    """One number; the long tables add its spread in brackets."""
    if row is None or row["value"] in ("", "None"):
        return ""
    text = _form(row["value"], metric)
    if row["metric"] == "transformed_layers":
        return f"{text} of {row['n']}"
    if not brief and row["low"] and row["high"]:
        text += f" ({_form(row['low'], metric)}–{_form(row['high'], metric)})"
    return text


def _form(value: str, metric: Metric) -> str:
    return f"{float(value) * metric.factor:.{metric.digits}f}"


def between_markers(text: str, inside: str) -> str:
    """`text` with what stands between the two markers replaced; ValueError if a marker is missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{inside}\n\n{END}{after}"


def rewritten(rows: Sequence[Row], root: Path = ROOT) -> dict[Path, str]:
    """The pages with tables, as they should read."""
    pages = {root / "README.md": True, root / "docs" / "results.md": False}
    inside = {page: make_tables(rows, brief=brief) for page, brief in pages.items()}
    inside[root / "docs" / "kernels.md"] = make_kernel_page(rows)
    return {page: between_markers(page.read_text(encoding="utf-8"), text) for page, text in inside.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Add what is asked for, then rewrite or check the pages."""
    parser = argparse.ArgumentParser(description="Write the result tables of README.md and of docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    parser.add_argument("--add", nargs="+", metavar="REPORT", default=[], help="report.json files to take in first")
    parser.add_argument(
        "--tag",
        choices=(ABLATION, PEERS),
        default="",
        help="put added evaluations into the table of ablations, or other runs into that of recipes beside other tools",
    )
    flags = parser.parse_args(arguments)
    for file in map(Path, flags.add):
        rows = rows_from_report(json.loads(file.read_text(encoding="utf-8")), tag=flags.tag)
        add_rows([*rows, *(gain_rows(rows, file.parent / "samples") if flags.tag == ABLATION else [])])
    stale = {page: text for page, text in rewritten(read_results()).items() if page.read_text(encoding="utf-8") != text}
    for page, text in stale.items():
        if flags.check:
            print(f"{page.relative_to(ROOT)} is out of date; run python -m benchmarks.tables")
        else:
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 1 if flags.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
