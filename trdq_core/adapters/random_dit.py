"""Models with random weights: they show speed and memory at common sizes, never quality. Here what they have in common,
and the DiT.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from trdq_core.adapters.roles import find_linears
from trdq_core.errors import ModelError
from trdq_core.plan import LayerInfo
from trdq_core.sampling import Conditioning, OnStep

CLASSES = 1000


def build(device: str = "cpu") -> DiTTransformer2DModel:
    """12 layers, 6 heads of 64, 32x32 latents in patches of 2: 256 tokens. Seeded, so every run times the same weights."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            num_attention_heads=6,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            num_layers=12,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
            norm_elementwise_affine=False,
        ).eval()


class RandomModel(ABC):
    """A random transformer with guidance batch 2. It can be calibrated and profiled, but it has no pictures to show."""

    timestep_argument = "timestep"
    clip = None
    decodes = False  # there is no decoder, so a run ends with latents

    def __init__(self, name: str, denoiser: nn.Module) -> None:
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        if self.device.type == "cuda":
            denoiser = denoiser.to(self.device, self.dtype)
        self.denoiser: nn.Module = denoiser.requires_grad_(False)
        self._active = self.denoiser

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """A made-up conditioning for each text, unconditional part first."""

    @abstractmethod
    def fingerprint(self) -> str:
        """The name of the construction: its weights follow from the seed."""

    @abstractmethod
    def _predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The output for guided latents (2n, 4, 32, 32), all unconditional ones first."""

    def linears(self) -> tuple[LayerInfo, ...]:
        """Every linear of the transformer with its role."""
        return find_linears(self.denoiser)

    def initial_latents(self, seed: int) -> Tensor:
        """Noise (1, 4, 32, 32) of a seed."""
        return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def denoise(
        self, conditioning: Conditioning, latents: Tensor, *, steps: int, guidance: float, on_step: OnStep
    ) -> Tensor:
        """Euler steps of a flow, both branches in one batch; the numbers mean nothing, the work is that of a real run."""
        for step in range(steps):
            timestep = round(999 * (1 - step / steps))
            guided = torch.cat([latents] * 2)
            velocity = self._predict(guided, torch.full((len(guided),), timestep, device=self.device), conditioning)
            unconditional, conditional = velocity.chunk(2)
            latents = latents - (unconditional + guidance * (conditional - unconditional)) / steps
            on_step(step, float(timestep), latents)
        return latents

    def decode(self, latents: Tensor) -> np.ndarray:
        """Refused: random weights make no pictures."""
        raise ModelError(
            f"model {self.name}: its weights are random and make no pictures; use profile, or another model."
        )

    def encoder_features(self, pictures: np.ndarray) -> list[Tensor]:
        """Refused: there is no autoencoder."""
        raise ModelError(f"model {self.name}: it has no autoencoder to look at pictures with; use another model.")

    @contextmanager
    def using(self, denoiser: nn.Module) -> Iterator[None]:
        """Sample with another transformer while the context is open."""
        self._active, before = denoiser, self._active
        try:
            yield
        finally:
            self._active = before


class RandomDiT(RandomModel):
    """The random DiT: classes in place of prompts."""

    def __init__(self, name: str) -> None:
        super().__init__(name, build())

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """The empty class for guidance, then a class number for each text: the unconditional half is the first."""
        return [
            Conditioning(p, {"labels": torch.tensor([CLASSES, sum(p.encode()) % CLASSES], device=self.device)})
            for p in prompts
        ]

    def fingerprint(self) -> str:
        """The name of the construction: its weights follow from the seed."""
        return f"random-dit-2-12x384-{self.dtype}"

    def _predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        # Joined conditionings come as pairs; the guided batch has all unconditional ones first.
        labels = conditioning.tensors["labels"].view(-1, 2).T.flatten()
        return self._active(hidden_states=latents, timestep=timestep, class_labels=labels, return_dict=False)[0]
