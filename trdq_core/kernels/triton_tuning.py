"""Which configuration of a Triton kernel runs a shape: the fastest of a list, timed on the first call and remembered.

Triton's own autotuner synchronizes wherever it first meets a shape, also inside the recording of a CUDA graph, which
fails there. This one takes the first configuration then, and tunes at the next call outside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

Config = TypeVar("Config")

_chosen: dict[Hashable, object] = {}
_lock = threading.Lock()


def run_fastest(
    key: Hashable, configs: Sequence[Config], launch: Callable[[Config], object], device: torch.device
) -> None:
    """Launch with the fastest of `configs` for `key` (kernel, shapes, device); the first call times them all.

    A configuration that does not compile or asks for too much shared memory is passed over. `launch` may run often.
    """
    if len(configs) == 1 or device.type != "cuda":
        launch(configs[0])
        return
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            launch(configs[0])
            return
        with _lock:
            if key not in _chosen:
                _chosen[key] = fastest(configs, launch, do_bench)
    launch(_chosen[key])


def fastest(
    configs: Sequence[Config], launch: Callable[[Config], object], time: Callable[[Callable[[], object]], float]
) -> Config:
    """The configuration whose launch takes the least time; if none runs, the error of the last."""
    times: list[tuple[float, Config]] = []
    failure: Exception | None = None
    for config in configs:
        try:
            times.append((time(lambda config=config: launch(config)), config))
        except (OutOfResources, PTXASError, CompilationError) as error:
            failure = error
    if not times:
        assert failure is not None  # configs is never empty
        raise failure
    return min(times, key=lambda pair: pair[0])[1]
