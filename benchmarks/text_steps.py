"""What it saves that a denoiser computes the side of the text once a run: steps with a text seen before, and with a new one.

    python -m benchmarks.text_steps --add                            # four layers of PixArt-XL, into benchmarks/results.csv
    python -m benchmarks.text_steps --model pocket-image --rounds 40

Steps in turn on one denoiser and one input: the text of the step before, then a copy of it, which nobody has seen yet. A run
has one step of the second kind, its first; benchmarks.peers and the profile command time the first kind.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_tables import TEXT
from benchmarks.tables import RESULTS, add_rows
from trdq_core import branches
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.kernels import dispatch
from trdq_core.models import load_model
from trdq_core.presets import parse_recipe
from trdq_core.profiling import machine, summary
from trdq_core.sampling import SampledModel, sample

PROMPTS = ("red apple",)  # which text it is has no bearing on the time
GUIDANCE = 3.5


def last_call(model: SampledModel, denoiser: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the last denoiser call of a short run, by place and by name."""
    seen: list[Any] = []
    hook = denoiser.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    with model.using(denoiser):
        sample(model, model.encode(PROMPTS)[0], 0, steps=2, guidance=GUIDANCE)
    hook.remove()
    return seen[-1]


@torch.no_grad()
def rounds_of(step: Callable[[Tensor], object], text: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of steps with the text seen before and with a copy of it, in turn."""
    known, new = [], []
    for _ in range(rounds):
        copy = text.clone()
        for times in (new, known):  # the second sees the copy again
            started = time.perf_counter()
            step(copy)
            times.append(1000 * (time.perf_counter() - started))
    return known, new


def rows_of(model: str, recipe: str, known: Sequence[float], new: Sequence[float]) -> list[dict[str, object]]:
    """Rows of results.csv, medians with the 10th and 90th percentile; the share is that of each round."""
    found = machine()
    head = {
        "date": datetime.date.today().isoformat(), "device": found["gpu"] or found["cpu"], "threads": found["threads"],
        "model": model, "recipe": recipe, "note": TEXT, "n": len(known),
    }  # fmt: skip
    shares = [100 * (1 - seen / unseen) for seen, unseen in zip(known, new, strict=True)]
    rows: list[dict[str, object]] = []
    for metric, own, factor in (("known_text_ms", known, 1.0), ("new_text_ms", new, 1.0), ("text_share", shares, 0.01)):
        numbers = summary(own)
        value, low, high = (round(factor * float(numbers[key]), 6) for key in ("median", "p10", "p90"))
        rows.append({**head, "metric": metric, "value": value, "low": low, "high": high})
    return rows


def measured(name: str, recipe: str, rounds: int, folder: Path) -> list[dict[str, object]]:
    """The rows of one model under one recipe."""
    model = load_model(name)
    found = calibrate(model, PROMPTS, steps=2, guidance=GUIDANCE, seed=0)
    conversion = convert(
        model.denoiser, model.linears(), parse_recipe(recipe), found,
        backend=dispatch.select_backend(model.device), storage_folder=folder, argument=model.timestep_argument,
    )  # fmt: skip
    args, call = last_call(model, conversion.denoiser)
    text = call.pop("encoder_hidden_states")
    with branches.joint():
        timed = rounds_of(lambda text: conversion.denoiser(*args, **call, encoder_hidden_states=text), text, rounds + 3)
    known, new = (times[3:] for times in timed)  # the first ones warm up
    return rows_of(name, recipe, known, new)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=("random-pixart-xl", "pocket-image"), metavar="NAME")
    parser.add_argument("--recipes", default="tr-dq-w8a8,tr-dq-w4a8", metavar="A,B")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--add", action="store_true", help="take the figures into benchmarks/results.csv")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file that --add writes to")
    options = parser.parse_args(arguments)
    for name in options.model:
        for recipe in options.recipes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                rows = measured(name, recipe, options.rounds, Path(folder))
            for row in rows:
                print(f"{name:24}{recipe:20}{row['metric']:16}{row['value']:>12} ({row['low']}–{row['high']})")
            if options.add:
                add_rows(rows, options.out)


if __name__ == "__main__":
    main()
