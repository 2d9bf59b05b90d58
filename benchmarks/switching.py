"""What switched storage costs: how much of a run goes into swapping the sets of its time groups.

    python -m benchmarks.switching --add                             # 20 steps, 4 groups, into benchmarks/results.csv
    python -m benchmarks.switching --model pocket-image --runs 20

Two numbers a run. "swap_share": the time inside of the swaps over that of the run. "switch_share": what the steps in which a
swap took place are longer than the median of the others, over that of the run; so it holds the swap, the page faults and cold
caches after it, and the thread that reads the next set meanwhile. It is a difference of noisy times and may be negative.
The first run prepares the sets and is not counted.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.kernel_tables import SWITCHING
from benchmarks.tables import RESULTS, add_rows
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion, convert
from trdq_core.kernels import dispatch
from trdq_core.models import load_model
from trdq_core.presets import parse_recipe
from trdq_core.profiling import machine, summary
from trdq_core.sampling import SampledModel, sample

PROMPTS = ("red apple",)  # what sets are fitted to has no bearing on how long they take to swap


class SwitchedRun(NamedTuple):
    """One run: milliseconds of its steps, and of the swaps by the step that they took place in."""

    step_ms: list[float]
    swaps: dict[int, float]

    @property
    def run_ms(self) -> float:
        """All steps."""
        return sum(self.step_ms)

    @property
    def swap_share(self) -> float:
        """Of the run, what was spent inside of swaps."""
        return sum(self.swaps.values()) / self.run_ms

    @property
    def switch_share(self) -> float:
        """Of the run, what steps with a swap took beyond the median of the others. The first, which warms up, is no other."""
        plain = statistics.median(ms for index, ms in enumerate(self.step_ms) if index and index not in self.swaps)
        return sum(self.step_ms[index] - plain for index in self.swaps) / self.run_ms


def converted(model: SampledModel, recipe: str, groups: int, steps: int, folder: Path) -> Conversion:
    """The model's denoiser under a recipe with several time groups, its sets in a file in `folder`."""
    found = calibrate(model, PROMPTS, steps=steps, guidance=3.5, seed=0)
    return convert(
        model.denoiser, model.linears(), parse_recipe(recipe, groups=groups, storage="switched"), found,
        backend=dispatch.select_backend(model.device), storage_folder=folder, argument=model.timestep_argument,
    )  # fmt: skip


def timed_run(model: SampledModel, conversion: Conversion, steps: int) -> SwitchedRun:
    """Sample once, and tell the time of each step and of the swap in it."""
    sets = conversion.switched
    assert sets is not None  # the recipe has several groups
    ends, swapped = [], [len(sets.swap_seconds)]

    def on_step(step: int, timestep: float, latents: torch.Tensor) -> None:
        ends.append(time.perf_counter())
        swapped.append(len(sets.swap_seconds))

    conditioning = model.encode(PROMPTS)[0]
    with model.using(conversion.denoiser):
        started = time.perf_counter()
        sample(model, conditioning, 0, steps=steps, guidance=3.5, on_step=on_step)
    step_ms = [1000 * (end - begin) for begin, end in zip([started, *ends[:-1]], ends, strict=True)]
    swaps = {
        index: 1000 * sum(sets.swap_seconds[swapped[index] : swapped[index + 1]])
        for index in range(len(ends))
        if swapped[index + 1] > swapped[index]
    }
    return SwitchedRun(step_ms, swaps)


def rows_of(model: str, recipe: str, groups: int, runs: Sequence[SwitchedRun]) -> list[dict[str, object]]:
    """Rows of results.csv, medians over runs with the 10th and 90th percentile."""
    found = machine()
    head = {
        "date": datetime.date.today().isoformat(), "device": found["gpu"] or found["cpu"], "threads": found["threads"],
        "model": model, "recipe": f"{recipe}-{groups}-groups",
        "note": f"{len(runs[0].step_ms)} steps, {groups} time groups; {SWITCHING}",
    }  # fmt: skip
    values: Mapping[str, list[float]] = {
        "run_ms": [run.run_ms for run in runs],
        "swaps": [float(len(run.swaps)) for run in runs],
        "swap_ms": [ms for run in runs for ms in run.swaps.values()],
        "swap_share": [100 * run.swap_share for run in runs],
        "switch_share": [100 * run.switch_share for run in runs],
    }
    rows: list[dict[str, object]] = []
    for metric, own in values.items():
        factor = 0.01 if metric.endswith("_share") else 1.0  # rounded as percentages, stored as shares
        numbers = summary(own)
        value, low, high = (round(factor * float(numbers[key]), 6) for key in ("median", "p10", "p90"))
        rows.append({**head, "metric": metric, "value": value, "low": low, "high": high, "n": len(runs)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=("random-dit", "random-pixart-xl"), metavar="NAME")
    parser.add_argument("--recipe", default="tr-dq-w8a8")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--add", action="store_true", help="take the figures into benchmarks/results.csv")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that --add writes to")
    options = parser.parse_args(arguments)
    for name in options.model:
        model = load_model(name)
        with tempfile.TemporaryDirectory() as folder:
            conversion = converted(model, options.recipe, options.groups, options.steps, Path(folder))
            timed_run(model, conversion, options.steps)
            runs = [timed_run(model, conversion, options.steps) for _ in range(options.runs)]
            rows = rows_of(name, options.recipe, options.groups, runs)
        for row in rows:
            print(f"{name:24}{row['recipe']:28}{row['metric']:14}{row['value']:>12} ({row['low']}–{row['high']})")
        if options.add:
            add_rows(rows, options.out)


if __name__ == "__main__":
    main()
