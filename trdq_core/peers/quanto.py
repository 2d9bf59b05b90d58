"""optimum-quanto: int8 weights per channel, alone or with one static range for each input."""

from __future__ import annotations

import time

import torch

from trdq_core.peers.base import Converted, Task
from trdq_core.peers.measures import file_bytes, held_bytes, kernels_of, weight_bytes


def convert(task: Task) -> Converted:
    """The denoiser with quanto's linears, frozen. Static ranges follow its own running mean over the calibration calls."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    static = task.peer.static
    quantize(task.denoiser, weights=qint8, activations=qint8 if static else None, include=list(task.layers))
    seconds = 0.0
    if static:
        started = time.perf_counter()
        calls = task.calls()  # not inside: its context listens to every module there is
        with torch.no_grad(), Calibration():
            for call in calls:
                task.denoiser(**call)
        seconds = time.perf_counter() - started
    freeze(task.denoiser)
    return Converted(
        task.denoiser,
        kernels_of(task.denoiser, task.example, task.layers),
        weight_bytes(task.denoiser, task.layers),
        held_bytes(task.denoiser),
        file_bytes(task.denoiser),
        seconds,
    )
