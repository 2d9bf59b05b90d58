"""PixArt-alpha and PixArt-Sigma pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from trdq_core.adapters.pipelines import PipelineModel, linears_from_config
from trdq_core.plan import LayerInfo
from trdq_core.sampling import Conditioning, OnStep
from trdq_core.specs import DEFAULT_LOADING, Loading

PIPELINES = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
MAX_TOKENS = 32
_EMBEDS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


class PixArtModel(PipelineModel):
    """A PixArt pipeline as something that can be calibrated and compared."""

    def __init__(self, folder: Path, name: str | None = None, loading: Loading = DEFAULT_LOADING) -> None:
        super().__init__(folder, PIPELINES, name, loading)
        self._tokens = min(MAX_TOKENS, self.pipeline.tokenizer.model_max_length)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Each prompt and the empty negative prompt as embeddings with their masks."""
        encoded = []
        for prompt in prompts:
            parts = self.pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=True,
                negative_prompt="",
                device=self.device,
                clean_caption=False,
                max_sequence_length=self._tokens,
            )
            encoded.append(Conditioning(prompt, dict(zip(_EMBEDS, parts, strict=True))))
        return encoded

    def initial_latents(self, seed: int) -> Tensor:
        """Noise from a CPU generator, so that every device starts from the same latents."""
        config = self.pipeline.transformer.config
        generator = torch.Generator().manual_seed(seed)
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def denoise(
        self, conditioning: Conditioning, latents: Tensor, *, steps: int, guidance: float, on_step: OnStep
    ) -> Tensor:
        """Final latents (n, channels, height, width); `on_step` sees them after every step and may raise to stop."""
        side = self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor
        return self.pipeline(
            prompt=None,
            negative_prompt=None,
            **{name: conditioning.tensors[name] for name in _EMBEDS},
            latents=latents.clone(),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=side,
            width=side,
            use_resolution_binning=False,
            clean_caption=False,
            output_type="latent",
            return_dict=False,
            callback=lambda step, timestep, value: on_step(step, float(timestep), value),
            callback_steps=1,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """The picture (height, width, 3) uint8 of latents (1, channels, height, width)."""
        vae = self.pipeline.vae
        picture = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        values = (picture[0].float().clamp(-1, 1) + 1) * 127.5
        return values.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def layers_from_config(folder: Path) -> tuple[LayerInfo, ...]:
    """The transformer's linears from its config.json alone, built without memory on the meta device."""
    return linears_from_config(folder, PIPELINES, PixArtTransformer2DModel)
