"""Latte pipelines of diffusers: text to video, spatial and temporal blocks in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor

from trdq_core.adapters.pipelines import PipelineModel, linears_from_config
from trdq_core.errors import ShapeError
from trdq_core.plan import LayerInfo
from trdq_core.sampling import ClipShape, Conditioning, OnStep
from trdq_core.specs import DEFAULT_LOADING, Loading

PIPELINES = ("LattePipeline",)
FPS = 8.0  # of the clips that Latte was trained on
FRAMES_AT_ONCE = 8  # frames decoded together; a decoder needs far more memory for a frame than a denoiser
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


class LatteModel(PipelineModel):
    """A Latte pipeline as something that can be calibrated and compared.

    The denoiser is handed one timestep for each clip in the batch and repeats it for frames and patches by itself.
    """

    def __init__(self, folder: Path, name: str | None = None, loading: Loading = DEFAULT_LOADING) -> None:
        super().__init__(folder, PIPELINES, name, loading)

    @property
    def frames(self) -> int:
        """Frames in a clip: the transformer has a temporal position for each and takes neither fewer nor more."""
        return int(self.pipeline.transformer.config.video_length)

    @property
    def clip(self) -> ClipShape:  # type: ignore[override]
        """Frames and pixels of its clips: those of its configuration, no others."""
        side = self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor
        return ClipShape(self.frames, side, side, FPS)

    def check_latents(self, latents: Tensor) -> None:
        """ShapeError unless the latents are of clips that the transformer has positions for."""
        side = self.clip.width
        config, scale = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        wanted = (config.in_channels, self.frames, config.sample_size, config.sample_size)
        if latents.dim() != 5 or tuple(latents.shape[1:]) != wanted:
            got = f"latents of {tuple(latents.shape)}"
            if latents.dim() == 5:
                frames, height, width = latents.shape[2:]
                got = (
                    f"{frames} frames of {scale * width}x{scale * height} pixels in {latents.shape[1]} latent channels"
                )
            raise ShapeError(
                f"model {self.name}: got {got}; it makes {self.frames} frames of {side}x{side} pixels in "
                f"{config.in_channels} latent channels and no others, start from its own initial latents."
            )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Each prompt and the empty one as embeddings (1, tokens, width).

        Latte's transformer takes no mask: the pipeline cuts both to the tokens of the prompt, one prompt at a time.
        """
        encoded = []
        for prompt in prompts:
            parts = self.pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=True,
                negative_prompt="",
                device=self.device,
                clean_caption=False,
                mask_feature=True,
            )
            encoded.append(Conditioning(prompt, dict(zip(_EMBEDS, parts, strict=True))))
        return encoded

    def initial_latents(self, seed: int) -> Tensor:
        """Noise (1, channels, frames, height, width) from a CPU generator: the same on every device."""
        config = self.pipeline.transformer.config
        generator = torch.Generator().manual_seed(seed)
        shape = (1, config.in_channels, self.frames, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def denoise(
        self, conditioning: Conditioning, latents: Tensor, *, steps: int, guidance: float, on_step: OnStep
    ) -> Tensor:
        """Final latents (1, channels, frames, height, width); `on_step` sees them after every step and may raise to stop."""
        self.check_latents(latents)

        def after_step(pipeline: Any, step: int, timestep: Tensor, seen: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(step, float(timestep), seen["latents"])
            return {}

        return self.pipeline(
            prompt=None,
            negative_prompt=None,
            **{name: conditioning.tensors[name] for name in _EMBEDS},
            latents=latents.clone(),
            num_inference_steps=steps,
            guidance_scale=guidance,
            video_length=self.frames,
            height=self.clip.height,
            width=self.clip.width,
            clean_caption=False,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents"],
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """The clip (frames, height, width, 3) uint8 of latents (1, channels, frames, height, width)."""
        self.check_latents(latents)
        vae = self.pipeline.vae
        frames = latents[0].transpose(0, 1).to(vae.dtype) / vae.config.scaling_factor
        decoded = []
        for chunk in frames.split(FRAMES_AT_ONCE):
            values = (vae.decode(chunk, return_dict=False)[0].float().clamp(-1, 1) + 1) * 127.5
            decoded.append(values.round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return torch.cat(decoded).numpy()


def layers_from_config(folder: Path) -> tuple[LayerInfo, ...]:
    """The transformer's linears from its config.json alone, built without memory on the meta device."""
    return linears_from_config(folder, PIPELINES, LatteTransformer3DModel)
