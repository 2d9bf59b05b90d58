"""An invented pipeline and transformer that no table knows: other names, time from 1 to 0 as sigma, both branches in one call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional

WIDTH, TEXT = 64, 32


class Mixer(nn.Module):
    """Joint attention over text and picture under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.merge = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width)."""
        heads = [part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        return self.merge(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A block with a gated feed-forward, a linear that nobody could name, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()
        self.mlp = nn.ModuleDict({name: nn.Linear(WIDTH, 96) for name in ("up", "gate")})
        self.mlp["down"] = nn.Linear(96, WIDTH)
        self.adaln_modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.router = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (batch, tokens, width), time (batch, width)."""
        scale, gate = self.adaln_modulation(time)[:, None].chunk(2, -1)
        x = x + self.mixer(x * (1 + scale))
        y = functional.layer_norm(x, (WIDTH,))
        return x + gate * self.mlp["down"](functional.silu(self.mlp["gate"](y)) * self.mlp["up"](y)) + self.router(x)


class UnseenTransformer(ModelMixin, ConfigMixin):
    """Told sigma, 1 at the start."""

    @register_to_config
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.patchify, self.text_in = nn.Linear(channels, WIDTH), nn.Linear(TEXT, WIDTH)
        self.time_mlp = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.stages = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, channels)

    def forward(self, latent: Tensor, words: Tensor, sigma: Tensor) -> tuple[Tensor]:
        """latent (batch, channels, height, width), words (batch, tokens, text), sigma (batch,)."""
        x = self.patchify(latent.flatten(2).transpose(1, 2))
        x, time = torch.cat([self.text_in(words), x], 1), self.time_mlp(sigma[:, None].to(x))
        for stage in self.stages:
            x = stage(x, time)
        return (self.head(x[:, words.shape[1] :]).transpose(1, 2).unflatten(-1, latent.shape[2:]),)


class UnseenPipeline(DiffusionPipeline):
    """Text to picture with the conditional half first."""

    def __init__(self, transformer: UnseenTransformer, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def prepare_latents(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise (count, 4, 8, 8)."""
        return randn_tensor((count, 4, 8, 8), generator=generator)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "latent",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
    ) -> tuple[Tensor]:
        """Sampling with guidance in one batch."""
        latents = self.prepare_latents(len(prompt_embeds), generator)
        self.scheduler.set_timesteps(num_inference_steps)
        guided = guidance_scale > 1
        words = torch.cat([prompt_embeds, negative_prompt_embeds]) if guided else prompt_embeds
        for index, timestep in enumerate(self.scheduler.timesteps):
            batch = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(batch, words, (timestep / 1000).expand(len(batch)))[0]
            if guided:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(velocity, timestep, latents)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, index, timestep, {"latents": latents})
        return (latents,)


def unseen_pipeline() -> UnseenPipeline:
    """The invented pipeline with random weights."""
    torch.manual_seed(0)
    return UnseenPipeline(UnseenTransformer(), FlowMatchEulerDiscreteScheduler())


def unseen_embeddings() -> dict[str, Tensor]:
    """Embeddings of a prompt and of the empty one."""
    generator = torch.Generator().manual_seed(1)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(1, 5, TEXT, generator=generator) for name in names}
