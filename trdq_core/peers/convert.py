"""From a recipe that names another tool to a denoiser that the rest of a run treats like any other."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from trdq_core import profiling
from trdq_core.errors import PeerError, TRDQError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.nn.modules import share_copy
from trdq_core.peers.base import Call, Converted, PeerDenoiser, Task, reason
from trdq_core.peers.measures import compiled_since, compiled_so_far
from trdq_core.plan import LayerInfo, rule_for
from trdq_core.presets import Peer, find_peer, missing
from trdq_core.presets.peers import REQUIREMENTS
from trdq_core.sampling import SampledModel, sample
from trdq_core.specs import Recipe

MAX_CALLS = 300  # of a calibration, evenly spread over prompts and steps: NNCF's own number
EXAMPLE_STEPS = 2  # the fewest that every sampler takes; one call of them shows the shapes


@dataclass
class PeerConversion:
    """A denoiser that another tool converted, with what is known of it; stands where a Conversion stands."""

    denoiser: nn.Module
    recipe: Recipe
    known: dict[str, Any] = field(default_factory=dict)
    switched: None = None

    def facts(self) -> dict[str, Any]:
        """Bytes, kernels and times for reports, under the names that recipes use. See docs/peers.md."""
        return dict(self.known)


@dataclass(frozen=True)
class Sampling:
    """How the run samples: a peer sees the same prompts, steps, guidance and latents as the calibration of a recipe."""

    prompts: Sequence[str]
    steps: int
    guidance: float
    seed: int


def convert_peer(
    model: SampledModel,
    recipe: Recipe,
    sampling: Sampling,
    *,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> PeerConversion:
    """The model's denoiser as the tool makes it, tried on one call; the original is untouched.

    PeerError with one sentence if the tool is not installed, or cannot convert or run this model.
    """
    assert recipe.peer is not None  # the caller asked for nothing else
    peer = find_peer(recipe.peer)
    if absent := missing(peer):
        raise PeerError(f"{recipe.name}: {absent} brings what is missing.")
    chosen = _chosen(model.linears(), recipe)
    if recipe.quantized and not chosen:
        raise PeerError(f"{recipe.name}: no linear of this model matches a rule; check roles and match patterns.")
    recorder = _Recorder(model, recipe.name, sampling, on_event, cancelled)
    task = Task(
        peer, share_copy(model.denoiser), tuple(layer.name for layer in chosen), recipe.peer != peer.name,
        recorder.example(), recorder.calls,
    )  # fmt: skip
    started, before = time.perf_counter(), compiled_so_far()
    try:
        with _quietly():
            converted = importlib.import_module(f"trdq_core.peers.{peer.tool}").convert(task)
            denoiser = PeerDenoiser(converted.module, model.denoiser, recipe.name)
    except TRDQError:
        raise
    except Exception as error:
        raise PeerError(
            f"{recipe.name}: {_versions(peer)} could not convert or run this model ({reason(error)}); leave it out."
        ) from error
    seconds = time.perf_counter() - started - converted.calibration_seconds
    facts = _facts(peer, converted, chosen, seconds)
    compiled = compiled_since(before)
    if any(compiled):
        facts["compiled"] = compiled._asdict()
    return PeerConversion(denoiser, recipe, facts)


def _chosen(layers: Sequence[LayerInfo], recipe: Recipe) -> list[LayerInfo]:
    return [layer for layer in layers if rule_for(layer, recipe)]


def _facts(peer: Peer, converted: Converted, chosen: Sequence[LayerInfo], seconds: float) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "peer",
        "peer": {"tool": peer.tool, "versions": _versions(peer), "description": peer.description},
        "resident_bytes": converted.resident_bytes,
        "file_bytes": converted.file_bytes,
        "disk_bytes": 0,
        "kernels": converted.kernels,
        "simulated": False,
        "sets": 1,
        "rejected": [],
        "calibration_seconds": round(converted.calibration_seconds, 2),
        "fit_seconds": round(seconds, 2),
    }
    if converted.weight_bytes is not None:
        count = sum(layer.in_features * layer.out_features for layer in chosen)
        bits = 8 * converted.weight_bytes / count
        facts |= {
            "weight_bytes": converted.weight_bytes, "fp_weight_bytes": 4 * count, "effective_bits": bits, "packed_bits": bits,
        }  # fmt: skip
    return facts


def _versions(peer: Peer) -> str:
    """ "openvino 2026.4.1, nncf 3.4.0": the packages that ran; torch's own compiler goes by torch."""
    found = []
    for package in peer.packages or ("torch",):
        name = REQUIREMENTS.get(package, package).partition(">")[0].partition("=")[0]
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found) or peer.tool


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the tools' bars, banners and warnings off the terminal, where a report or JSON is about to stand."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


class _Recorder:
    """Calls of the full-precision denoiser as the sampler makes them."""

    def __init__(
        self,
        model: SampledModel,
        name: str,
        sampling: Sampling,
        on_event: OnEvent,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._model, self._name, self._sampling = model, name, sampling
        self._on_event, self._cancelled = on_event, cancelled

    def example(self) -> Call:
        """One call, with the first prompt."""
        return self._record(self._sampling.prompts[0], EXAMPLE_STEPS, self._sampling.seed, None)[-1]

    def calls(self) -> list[Call]:
        """Calls of all calibration prompts, at most MAX_CALLS of them, evenly spread."""
        prompts, steps = self._sampling.prompts, self._sampling.steps
        progress = Progress(
            "observe", len(prompts) * steps, on_event=self._on_event, cancelled=self._cancelled, recipe=self._name
        )
        found: list[Call] = []
        for index, prompt in enumerate(prompts):
            found += self._record(prompt, steps, self._sampling.seed + index, progress)
        stride = max(1.0, len(found) / MAX_CALLS)
        return [found[int(i * stride)] for i in range(min(len(found), MAX_CALLS))]

    def _record(self, prompt: str, steps: int, seed: int, progress: Progress | None) -> list[Call]:
        conditioning = self._model.encode([prompt])[0]

        def on_step(step: int, timestep: float, latents: Any) -> None:
            if progress is not None:
                progress.advance(prompt)

        return profiling.record_inputs(
            self._model.denoiser,
            lambda: sample(
                self._model, conditioning, seed, steps=steps, guidance=self._sampling.guidance, on_step=on_step
            ),
        )
