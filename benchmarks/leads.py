"""What sets recipes apart in evaluations: an ablation's paired differences, and the lead of ours over published recipes."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trdq_core.presets.methods import METHODS

GAIN = "final_latent_sqnr_gain_db"
SCORE = "final_latent_sqnr_db"
OWN = "this project"

Row = dict[str, str]


class Entry(NamedTuple):
    """One recipe of a bit-width's table: bits a weight in memory and in a packed file, and its latent SQNR in dB."""

    name: str
    bits: float
    packed: float
    score: float
    ours: bool


def base_of(recipe: str) -> str:
    """The ablation's recipe that `recipe` is one change away from: "no-gptq-w4a8" from "plus-base-w4a8"."""
    name, _, label = recipe.rpartition("-")
    return f"branch-{label}" if name.startswith("branch") else f"plus-base-{label}"


def paired_gain(own: Path, base: Path) -> tuple[float, float, int] | None:
    """Mean difference in final-latent SQNR between two files of samples, its standard error over prompts, and n.

    Seeds of one prompt are averaged first. Prompts differ by far more than recipes do, so that the difference of two means
    says much less than the mean of the differences. None where the files share no sample.
    """
    mine, other = _scores(own), _scores(base)
    shared = sorted(mine.keys() & other.keys())
    if not shared:
        return None
    prompts: dict[str, list[float]] = {}
    for prompt, seed in shared:
        prompts.setdefault(prompt, []).append(mine[prompt, seed] - other[prompt, seed])
    means = [statistics.fmean(gains) for gains in prompts.values()]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return statistics.fmean(means), error, len(shared)


def gain_rows(rows: Sequence[Row], samples: Path) -> list[Row]:
    """A row of the paired difference to its base for each ablated recipe among `rows` with both files in `samples`."""
    found = []
    for row in rows:
        own, base = (samples / f"{name}.csv" for name in (row["recipe"], base_of(row["recipe"])))
        if row["metric"] != SCORE or own == base or not own.exists() or not base.exists():
            continue
        gain = paired_gain(own, base)
        if gain is not None:
            mean, error, n = gain
            numbers = {"value": f"{mean:.7g}", "low": f"{mean - error:.7g}", "high": f"{mean + error:.7g}", "n": str(n)}
            found.append({**row, "metric": GAIN, **numbers})
    return found


def method_of(recipe: str) -> str:
    """ "tr-dq-plus" of "tr-dq-plus-1-group-w4a8" and of "tr-dq-plus-w4a8": the longest method that the name begins with."""
    return max((name for name in METHODS if recipe.startswith(f"{name}-") or recipe == name), key=len, default="")


def make_lead_table(tables: Mapping[str, Mapping[tuple[str, str], Row]]) -> str:
    """Markdown: for each bit-width and recipe of ours, the best published recipe packed into as many bits or fewer, the
    best of all published ones, and by how much ours is ahead. `tables` are latest rows by (recipe, metric), by bit-width.
    """
    lines = []
    for bits, latest in tables.items():
        entries = [entry for name in {recipe for recipe, _ in latest} if (entry := _entry(name, latest)) is not None]
        published = [entry for entry in entries if not entry.ours]
        for entry in sorted(filter(lambda entry: entry.ours, entries), key=lambda entry: -entry.score):
            lighter = [other for other in published if other.packed <= entry.packed]
            cells = [_against(entry, lighter), _against(entry, published)]
            numbers = f"{entry.bits:.2f} | {entry.packed:.2f} | {entry.score:.2f}"
            lines.append(f"| {bits} | {entry.name} | {numbers} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = [
        "Recipes of this project beside published ones, by final-latent SQNR. Bits count everything: codes, scales, transforms, "
        "low-rank factors; packed, also the sets of all time groups.",
        "",
        "| bits | ours | bits a weight | packed | latent SQNR dB | lead over the best published one packed into as many bits or "
        "fewer | lead over the best published one |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    return "\n".join([*head, *lines])


def _entry(name: str, latest: Mapping[tuple[str, str], Row]) -> Entry | None:
    metrics = [latest.get((name, metric)) for metric in ("effective_bits", "packed_bits", SCORE)]
    if any(row is None for row in metrics):
        return None
    bits, packed, score = (float(row["value"]) for row in metrics if row is not None)
    method = method_of(name)
    return Entry(name, bits, packed, score, bool(method) and METHODS[method].source == OWN)


def _against(entry: Entry, others: Iterable[Entry]) -> str:
    best = max(others, key=lambda other: other.score, default=None)
    if best is None:
        return "none"
    return f"{entry.score - best.score:+.2f} dB: {re.sub(r'-w[0-9]+a[0-9]+$', '', best.name)}, {best.packed:.2f} bits"


def _scores(file: Path) -> dict[tuple[str, str], float]:
    with file.open(newline="", encoding="utf-8") as lines:
        return {(row["prompt"], row["seed"]): float(row[SCORE]) for row in csv.DictReader(lines)}
