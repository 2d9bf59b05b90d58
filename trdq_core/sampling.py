"""Sampling with everything but one thing held equal: same embeddings, same initial latents, same scheduler and decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trdq_core import branches
from trdq_core.errors import RecipeError, ShapeError
from trdq_core.plan import LayerInfo
from trdq_core.timegroups import TimeArgument

OnStep = Callable[[int, float, Tensor], None]  # step, timestep, latents after it


class Conditioning(NamedTuple):
    """One prompt, encoded once: the tensors that the pipeline takes in place of text. `join` makes one of several."""

    prompt: str
    tensors: Mapping[str, Tensor]


def join(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Several prompts as one batch: their tensors one after the other along the first axis.

    ShapeError where their embeddings are of different lengths, as in pipelines that do not pad.
    """
    names = conditionings[0].tensors
    for one in conditionings[1:]:
        odd = [name for name in names if one.tensors[name].shape[1:] != conditionings[0].tensors[name].shape[1:]]
        if odd:
            raise ShapeError(
                f"prompts: {odd[0]} of {conditionings[0].prompt[:40]!r} and {one.prompt[:40]!r} are of different lengths, and "
                "this pipeline pads none; sample them one at a time, with sample or compare."
            )
    return Conditioning(
        "; ".join(one.prompt for one in conditionings),
        {name: torch.cat([one.tensors[name] for one in conditionings]) for name in names},
    )


def check_branches(model: SampledModel) -> None:
    """RecipeError if the guidance branches of a model's calls are in an order in which nothing can be shared or compared."""
    if getattr(model, "guidance_layout", "joint") == "joint_reversed":
        raise RecipeError(
            f"model {model.name}: its pipeline puts the conditional half of a batch first, and attention is compared and shared "
            "where the unconditional half comes first; leave sharing out."
        )


class ClipShape(NamedTuple):
    """The clips that a model makes: how many frames, their size in pixels, and frames a second. None where only a decoded
    clip shows it."""

    frames: int | None
    height: int | None
    width: int | None
    fps: float


class Trajectory(NamedTuple):
    """One sampled picture or clip: latents after every step, the timesteps, and the seconds that denoising took."""

    latents: list[Tensor]
    timesteps: list[float]
    seconds: float


class SampledModel(Protocol):
    """What a model must offer to be calibrated and compared. Adapters implement it."""

    name: str
    denoiser: nn.Module
    timestep_argument: TimeArgument | str
    device: torch.device
    dtype: torch.dtype
    clip: ClipShape | None  # None where it makes pictures

    def linears(self) -> tuple[LayerInfo, ...]:
        """Every linear of the denoiser with its role and the leader of the input it reads."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """The prompts as embeddings."""

    def initial_latents(self, seed: int) -> Tensor:
        """Noise (1, channels, height, width), or (1, channels, frames, height, width), that depends on the seed alone."""

    def denoise(
        self, conditioning: Conditioning, latents: Tensor, *, steps: int, guidance: float, on_step: OnStep
    ) -> Tensor:
        """Run the sampler on latents (n, ...) and n conditionings joined; `on_step` comes after every step and may raise."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """One picture (height, width, 3) uint8, or one clip (frames, height, width, 3) uint8."""

    def encoder_features(self, pictures: np.ndarray) -> list[Tensor]:
        """What the stages of the model's own autoencoder see in pictures (n, height, width, 3) uint8: (n, channels, ...) each."""

    def using(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """Sample with another denoiser while the context is open."""

    def fingerprint(self) -> str:
        """A digest of the denoiser's weights and configuration."""


@torch.no_grad()
def sample(
    model: SampledModel,
    conditioning: Conditioning,
    seed: int,
    *,
    steps: int,
    guidance: float,
    on_step: OnStep | None = None,
) -> Trajectory:
    """Sample one picture or clip and keep its latents after every step."""
    latents: list[Tensor] = []
    timesteps: list[float] = []
    outside = 0.0  # spent in `on_step`, on previews and reports: not part of sampling

    def keep(step: int, timestep: float, value: Tensor) -> None:
        nonlocal outside
        latents.append(value.clone())
        timesteps.append(timestep)
        if on_step is not None:
            entered = time.perf_counter()
            on_step(step, timestep, value)
            outside += time.perf_counter() - entered

    noise = model.initial_latents(seed)
    started = time.perf_counter()
    with branches.joint() if guidance > 1 else branches.single():
        model.denoise(conditioning, noise, steps=steps, guidance=guidance, on_step=keep)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return Trajectory(latents, timesteps, time.perf_counter() - started - outside)


@torch.no_grad()
def sample_batch(
    model: SampledModel,
    conditionings: Sequence[Conditioning],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample several pictures at once from the latents `sample` starts with; the final latents (n, ...), nothing else kept.

    Grids of single tokens do not look at the rest of a batch, so each picture is that of `sample` up to float noise.
    """
    noise = torch.cat([model.initial_latents(seed) for seed in seeds])
    with branches.joint() if guidance > 1 else branches.single():
        return model.denoise(
            join(conditionings), noise, steps=steps, guidance=guidance, on_step=on_step or (lambda *seen: None)
        )
