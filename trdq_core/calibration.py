"""Calibration: sample with the full-precision model and record what its linears read. The result serves many recipes."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trdq_core.errors import CalibrationError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.observers import InputObserver, RangeObserver, observing
from trdq_core.passes import RangeRequest
from trdq_core.presets.methods import TEXT_ROLES
from trdq_core.sampling import Conditioning, SampledModel, sample
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeContext, TimeGroups

SAVE_EVERY = 30.0  # seconds between two saves of the prompts finished so far
ROWS_PER_CALL = 16  # token rows kept of each call; with 16 prompts and 20 steps, 256 a timestep
CALIBRATION_VERSION = 4
UNOBSERVED = ("other", "uncalled")  # roles that no recipe is meant for


def calibration_fingerprint(
    model: SampledModel, prompts: Sequence[str], *, steps: int, guidance: float, seed: int
) -> str:
    """A digest of everything the statistics depend on: equal fingerprints mean equal statistics."""
    what = [CALIBRATION_VERSION, ROWS_PER_CALL, model.fingerprint(), list(prompts), steps, guidance, seed]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def calibrate(
    model: SampledModel,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
    partial: Path | None = None,
) -> Statistics:
    """First pass: sample every prompt in full precision and observe the inputs of all linears inside the blocks.

    Rows and ranges are keyed by timestep, so groups are always fitted on activations of their own timesteps. Prompts are
    sampled one by one from seeds of their own. With a folder `partial`, finished prompts are saved there when the work is
    cancelled, fails or lasts long, and the next call with the same settings goes on from them.
    """
    if not prompts:
        raise CalibrationError("calibration: no prompts were given; give at least one.")
    started = time.monotonic()
    settings = {"steps": steps, "guidance": guidance, "seed": seed}
    about = {"fingerprint": calibration_fingerprint(model, prompts, **settings), "model": model.name, **settings}
    leaders = list(dict.fromkeys(layer.leader for layer in model.linears() if layer.role not in UNOBSERVED))
    resumed = _resume(partial, about)
    done = resumed.about["finished"] if resumed is not None else 0
    progress = Progress("calibrate", len(prompts) * steps, on_event=on_event, cancelled=cancelled, done=done * steps)
    timesteps = resumed.timesteps if resumed is not None else ()
    saved = started
    context = TimeContext(TimeGroups())
    observers = {name: InputObserver(name, context, ROWS_PER_CALL, seed + i) for i, name in enumerate(leaders)}
    for name, observer in observers.items() if resumed is not None else ():
        if name in resumed.layers:
            observer.keep(resumed.layer(name))
    hooks = {"argument": model.timestep_argument, "text_inputs": text_inputs(model)}
    with observing(model.denoiser, observers, context, **hooks):
        try:
            for index, conditioning in list(enumerate(model.encode(prompts)))[done:]:
                timesteps = _observe_prompt(model, conditioning, index, observers, progress, settings)
                done = index + 1
                if partial is not None and time.monotonic() - saved > SAVE_EVERY:
                    _collect(observers, timesteps, {**about, "finished": done}).save(partial)
                    saved = time.monotonic()
        except BaseException:
            if partial is not None and done:
                _collect(observers, timesteps, {**about, "finished": done}).save(partial)
            raise
    about |= {
        "prompts": list(prompts),
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 2),
    }
    if partial is not None:
        shutil.rmtree(partial, ignore_errors=True)
    return _collect(observers, timesteps, about)


def observe_ranges(
    model: SampledModel,
    statistics: Statistics,
    requests: Mapping[str, RangeRequest],
    groups: TimeGroups,
    *,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Second pass, for static activation grids: the range of every transformed input, one for each of its sets.

    Channel ranges of the first pass do not survive a rotation, so the calibration's prompts are sampled again, in full
    precision, and the inputs observed through their fitted transforms. `requests` go by the name of a linear.
    """
    about = statistics.about
    context = TimeContext(groups)
    observers = {
        name: RangeObserver(
            name,
            context,
            [one.transform for one in request.fitted.distinct],
            request.count,
            request.spec.momentum if request.spec.range == "ema" else None,
        )
        for name, request in requests.items()
    }
    progress = Progress("observe", len(about["prompts"]) * about["steps"], on_event=on_event, cancelled=cancelled)
    hooks = {"argument": model.timestep_argument, "text_inputs": text_inputs(model)}
    with observing(model.denoiser, observers, context, **hooks):
        for index, conditioning in enumerate(model.encode(about["prompts"])):
            sample(
                model,
                conditioning,
                about["seed"] + index,
                steps=about["steps"],
                guidance=about["guidance"],
                on_step=lambda step, timestep, latents, c=conditioning: progress.advance(c.prompt),
            )
    return {name: tuple(observer.ranges) for name, observer in observers.items()}


def text_inputs(model: SampledModel) -> set[str]:
    """The linears that lead an input made of text tokens, some of which are padding."""
    return {layer.leader for layer in model.linears() if layer.role in ("cross_k", "cross_v", *TEXT_ROLES)}


def _observe_prompt(
    model: SampledModel,
    conditioning: Conditioning,
    index: int,
    observers: Mapping[str, InputObserver],
    progress: Progress,
    settings: Mapping[str, Any],
) -> tuple[float, ...]:
    """Sample one prompt under observation; returns its timesteps."""
    for observer in observers.values():
        observer.begin(index)
    trajectory = sample(
        model,
        conditioning,
        settings["seed"] + index,
        steps=settings["steps"],
        guidance=settings["guidance"],
        on_step=lambda step, timestep, latents: progress.advance(conditioning.prompt),
    )
    seen = next(observer.timesteps for observer in observers.values() if not observer.silent)
    if len(seen) != len(trajectory.timesteps):
        raise CalibrationError(
            f"calibration: the scheduler gave {len(seen)} different timesteps in {len(trajectory.timesteps)} steps; "
            "use fewer steps."
        )
    for name, observer in observers.items():
        if not observer.silent and observer.timesteps != seen:
            raise CalibrationError(
                f"{name}: it ran in {len(observer.timesteps)} of {len(seen)} steps only, and each step needs its statistics; "
                "sample with settings that run the whole model in every step."
            )
        observer.finish()
    return tuple(seen)


def _collect(
    observers: Mapping[str, InputObserver], timesteps: Sequence[float], about: Mapping[str, Any]
) -> Statistics:
    return Statistics(tuple(timesteps), {n: one.result() for n, one in observers.items() if not one.silent}, about)


def _resume(partial: Path | None, about: Mapping[str, Any]) -> Statistics | None:
    """What an interrupted calibration with the same fingerprint left, None if there is nothing usable."""
    if partial is None or not partial.is_dir():
        return None
    try:
        statistics = Statistics.load(partial)
    except CalibrationError:
        return None
    return statistics if statistics.about["fingerprint"] == about["fingerprint"] else None


def store(statistics: Statistics, folder: Path) -> Path:
    """Save statistics under `folder`/<fingerprint>, and return that folder."""
    target = folder / statistics.about["fingerprint"]
    statistics.save(target)
    return target
