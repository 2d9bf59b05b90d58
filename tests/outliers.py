"""A test bed without downloads: activations with outlier channels, and a small DiT whose outliers grow with the timestep.

Random but structured weights: what is measured here shows how the arithmetic behaves, never how good pictures are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trdq_core.adapters.roles import find_linears
from trdq_core.numerics.affine import fake_quantize_tokens
from trdq_core.plan import LayerInfo
from trdq_core.sampling import Conditioning, OnStep

# Width, heads and patches of the small DiT.
WIDTH, HEADS, BLOCKS, SIDE, LATENTS, CAPTION = 128, 2, 4, 8, 4, 6
OUTLIERS = (
    17,
    63,
    101,
)  # channels of the width that every modulation blows up: about 1 in 40, where a trained DiT has 1 in 100
CALM, ROUGH = 13.0, 40.0  # their modulation at timesteps 0 and 999


def outlier_rows(tokens: int = 512, channels: int = 1152, outliers: int = 12, seed: int = 1) -> Tensor:
    """Activations (tokens, channels) fp32: Gaussian, some random channels times 20 to 60, and one single value of 245."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((tokens, channels))
    x[:, draw.choice(channels, outliers, replace=False)] *= draw.uniform(20, 60, outliers)
    x[draw.integers(tokens), draw.integers(channels)] = 245
    return torch.from_numpy(x).float()


def heavy_tailed_weight(out_features: int, channels: int, seed: int = 0) -> Tensor:
    """A weight (out, channels) fp32 with Student's t of 4 degrees of freedom, scaled to keep the size of its input."""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.standard_t(4, (out_features, channels)) / math.sqrt(2 * channels)).float()


def token_sqnr_db(x: Tensor, bits: int) -> float:
    """Signal over quantization noise of x (tokens, channels) with an asymmetric grid for each token, in decibels."""
    noise = fake_quantize_tokens(x, bits=bits, symmetric=False) - x
    return 10 * math.log10(float(x.square().sum() / noise.square().sum()))


class Attention(nn.Module):
    """Multi-head attention with the names that diffusers gives its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (batch, tokens, width) attending to `context` (batch, other tokens, width)."""
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.to_out[0](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Modulation(nn.Module):
    """adaLN-zero: six vectors of the width from the features of a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6 * WIDTH)


class Projection(nn.Module):
    """A linear with its GELU, as diffusers' feed-forward names it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., 4 * width)."""
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The MLP of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projection(), nn.Identity(), nn.Linear(4 * WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Modulated self-attention, cross-attention, modulated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn1, self.attn2, self.ff = Modulation(), Attention(), Attention(), FeedForward()

    def forward(self, x: Tensor, features: Tensor, caption: Tensor) -> Tensor:
        """x (batch, tokens, width), features (batch, 4) of the timestep, caption (batch, words, width)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1.linear(features)[:, None].chunk(6, -1)
        seen = _norm(x) * (1 + scale) + shift
        x = x + gate * self.attn1(seen, seen)
        x = x + 0.5 * self.attn2(_norm(x), caption)
        return x + mlp_gate * self.ff(_norm(x) * (1 + mlp_scale) + mlp_shift)


class SmallDiT(nn.Module):
    """Four blocks of width 128 over 64 tokens; predicts v from latents (batch, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(LATENTS, WIDTH)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.proj_out = nn.Linear(WIDTH, LATENTS)
        self.register_buffer("position", torch.zeros(SIDE * SIDE, WIDTH))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *, timestep: Tensor) -> Tensor:
        """The prediction (batch, 4, 8, 8); captions (batch, words, width), timestep (batch,) from 0 to 999."""
        phase = timestep.float() / 999
        features = torch.stack([torch.ones_like(phase), phase, (3 * phase).sin(), (7 * phase).cos()], -1)
        x = self.patch_embed(hidden_states.flatten(2).transpose(1, 2)) + self.position
        for block in self.transformer_blocks:
            x = block(x, features, encoder_hidden_states)
        return self.proj_out(_norm(x)).transpose(1, 2).unflatten(-1, (SIDE, SIDE))


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],))


@torch.no_grad()
def small_dit(seed: int = 0) -> SmallDiT:
    """Heavy-tailed weights; the modulation of three channels falls from 40 at timestep 999 to 13 at 0, gates are not zero.

    Linears behind a modulation have small weights where it is large, as trained ones do, so that outliers carry about as
    much as other channels do.
    """
    model, draw = SmallDiT(), np.random.default_rng(seed)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        weight = parameter.dim() == 2
        parameter.copy_(
            heavy_tailed_weight(*parameter.shape, 100 * seed + index) if weight else torch.zeros_like(parameter)
        )
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight", "net.0.proj.weight")):
            parameter[:, list(OUTLIERS)] *= 3 / ROUGH
    model.position.copy_(torch.from_numpy(draw.standard_normal((SIDE * SIDE, WIDTH))))
    for block in model.transformer_blocks:
        weight, bias = block.norm1.linear.weight, block.norm1.linear.bias
        weight.mul_(0.1)
        bias.unflatten(0, (6, WIDTH))[[2, 5]] = 0.5
        for scale in (WIDTH, 4 * WIDTH):
            for channel in OUTLIERS:
                factor = draw.uniform(0.7, 1.3) * draw.choice([-1, 1])
                row = torch.tensor([factor * CALM - 1, factor * (ROUGH - CALM), 0.0, 0.0])
                weight[scale + channel] = row
    return model.eval().requires_grad_(False)


class OutlierModel:
    """The small DiT as something that can be calibrated and compared: DDIM with a cosine schedule and v-prediction."""

    name = "outliers"
    timestep_argument = "timestep"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, seed: int = 0) -> None:
        self.denoiser: nn.Module = small_dit(seed)
        self._seed = seed

    def linears(self) -> tuple[LayerInfo, ...]:
        """Every linear with its role."""
        return find_linears(self.denoiser)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Captions (1, words, width) drawn from the letters of each prompt; the empty prompt is zeros."""
        encoded = []
        for prompt in prompts:
            draw = np.random.default_rng(list(prompt.encode()))
            words = torch.from_numpy(draw.standard_normal((1, CAPTION, WIDTH))).float()
            encoded.append(Conditioning(prompt, {"caption": words, "empty": torch.zeros_like(words)}))
        return encoded

    def initial_latents(self, seed: int) -> Tensor:
        """Noise (1, 4, 8, 8)."""
        return torch.randn(1, LATENTS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))

    def denoise(
        self, conditioning: Conditioning, latents: Tensor, *, steps: int, guidance: float, on_step: OnStep
    ) -> Tensor:
        """Deterministic DDIM; both guidance branches in one batch, the unconditional one first."""
        captions = torch.cat([conditioning.tensors["empty"], conditioning.tensors["caption"]])
        times = [999 * (steps - step) / steps for step in range(steps)]
        for step, time in enumerate(times):
            angle, following = (math.pi / 2 * t / 1000 for t in (time, times[step + 1] if step + 1 < steps else 0.0))
            both = self.denoiser(latents.expand(2, -1, -1, -1), captions, timestep=torch.full((2,), time))
            v = both[:1] + guidance * (both[1:] - both[:1])
            # With signal cos and noise sin of one angle, a step of DDIM turns (x, v) from this angle to the following one.
            clean, noise = angle_parts(latents, v, angle)
            latents = math.cos(following) * clean + math.sin(following) * noise
            on_step(step, time, latents)
        return latents

    def decode(self, latents: Tensor) -> np.ndarray:
        """The first three latent channels as a picture (8, 8, 3) uint8."""
        return ((latents[0, :3].clamp(-2, 2) + 2) * 63.75).round().to(torch.uint8).permute(1, 2, 0).numpy()

    @contextmanager
    def using(self, denoiser: nn.Module) -> Iterator[None]:
        """Sample with another denoiser while the context is open."""
        original, self.denoiser = self.denoiser, denoiser
        try:
            yield
        finally:
            self.denoiser = original

    def fingerprint(self) -> str:
        """The seed is all that its weights depend on."""
        return f"outliers-{self._seed}"


def angle_parts(latents: Tensor, v: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a v-prediction stands for at an angle of the schedule."""
    return math.cos(angle) * latents - math.sin(angle) * v, math.sin(angle) * latents + math.cos(angle) * v
