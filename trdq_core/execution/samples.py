"""Sampling the prompts of a run with one denoiser, and keeping what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from trdq_core import profiling
from trdq_core.events import Progress
from trdq_core.outputs import Output, output_fields
from trdq_core.sampling import Trajectory, sample
from trdq_core.session import Session

PREVIEW_EVERY = 2  # steps between two previews of the first prompt
CLIP_PREVIEW_EVERY = 5  # the same of a clip, whose frames take as long to decode as some steps


@dataclass
class Samples:
    """What one denoiser made of the prompts of a run, in their order. `pictures` only where they were asked for."""

    runs: list[Trajectory] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0

    def row(self) -> dict[str, Any]:
        """The part of a report row on where the pictures are, end-to-end times and peak memory."""
        return {
            **output_fields(self.outputs),
            "end_to_end_ms": profiling.summary(self.milliseconds),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def sample_all(
    session: Session, name: str, denoiser: nn.Module, *, keep: bool = False, previews: bool = True
) -> Samples:
    """Sample, decode and save every prompt with one denoiser; with `keep`, what was decoded is in the result too."""
    spec, model = session.spec, session.model
    progress = session.progress("sample", len(session.conditionings) * spec.steps, name)
    samples = Samples()
    profiling.reset_peak_memory()
    with model.using(denoiser):
        for index, conditioning in enumerate(session.conditionings):
            on_step = _stepper(session, name, index, progress, previews)
            run = sample(
                model, conditioning, spec.seed + index, steps=spec.steps, guidance=spec.guidance, on_step=on_step
            )
            started = time.perf_counter()
            picture = model.decode(run.latents[-1])
            samples.milliseconds.append(1000 * (run.seconds + time.perf_counter() - started))
            samples.outputs.append(session.outputs.save(name, index, picture))
            samples.runs.append(run)
            if keep:
                samples.pictures.append(picture)
    samples.peak_rss_bytes = profiling.peak_rss_bytes()
    return samples


def _stepper(
    session: Session, name: str, index: int, progress: Progress, previews: bool
) -> Callable[[int, float, Tensor], None]:
    """What happens after each sampler step: progress, a look at Cancel, and now and then a preview of the first prompt."""
    spec = session.spec
    every = PREVIEW_EVERY if session.model.clip is None else CLIP_PREVIEW_EVERY

    def on_step(step: int, timestep: float, latents: Tensor) -> None:
        progress.advance(session.conditionings[index].prompt)
        if previews and index == 0 and step % every == 0 and step < spec.steps - 1:
            session.outputs.preview(name, step, spec.steps, session.model.decode(latents))

    return on_step
