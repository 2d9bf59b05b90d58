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
from trdq_core.plan import LayerInfo

OnStep = Callable[[int, float, Tensor], None]  # step, timestep, latents after it


class Conditioning(NamedTuple):
    """One prompt, encoded once: the tensors that the pipeline takes in place of text."""

    prompt: str
    tensors: Mapping[str, Tensor]


class Trajectory(NamedTuple):
    """One sampled picture or clip: latents after every step, the timesteps, and the seconds that denoising took."""

    latents: list[Tensor]
    timesteps: list[float]
    seconds: float


class SampledModel(Protocol):
    """What a model must offer to be calibrated and compared. Adapters implement it."""

    name: str
    denoiser: nn.Module
    timestep_argument: str
    device: torch.device
    dtype: torch.dtype

    def linears(self) -> tuple[LayerInfo, ...]:
        """Every linear of the denoiser with its role and the leader of the input it reads."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """The prompts as embeddings."""

    def initial_latents(self, seed: int) -> Tensor:
        """Noise (1, channels, height, width), or (1, channels, frames, height, width), that depends on the seed alone."""

    def denoise(
        self, conditioning: Conditioning, latents: Tensor, *, steps: int, guidance: float, on_step: OnStep
    ) -> Tensor:
        """Run the sampler; `on_step` is called after every step and may raise to stop it."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """One picture (height, width, 3) uint8, or one clip (frames, height, width, 3) uint8."""

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
