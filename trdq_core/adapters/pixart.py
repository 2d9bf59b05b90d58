"""PixArt-alpha and PixArt-Sigma pipelines of diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from trdq_core.adapters.folder import check_folder, check_weights, weights_digest
from trdq_core.adapters.quiet import without_progress_bars
from trdq_core.adapters.roles import find_linears
from trdq_core.errors import ModelError
from trdq_core.plan import LayerInfo
from trdq_core.sampling import Conditioning, OnStep

PIPELINES = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
MAX_TOKENS = 32
_EMBEDS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


class PixArtModel:
    """A PixArt pipeline as something that can be calibrated and compared. FP32 on a CPU, FP16 on a GPU."""

    timestep_argument = "timestep"

    def __init__(self, folder: Path, name: str | None = None) -> None:
        check_folder(folder, PIPELINES)
        self._files = sorted((folder / "transformer").glob("*.safetensors"))
        check_weights(self._files, folder)
        self.name = name or folder.name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        try:
            with without_progress_bars():
                self.pipeline = DiffusionPipeline.from_pretrained(folder, dtype=self.dtype, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ModelError(
                f"model {folder.name}: diffusers could not load it ({reason}); copy the folder again."
            ) from error
        self.pipeline.to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        for part in (self.pipeline.transformer, self.pipeline.vae, self.pipeline.text_encoder):
            part.requires_grad_(False).eval()
        self.denoiser: nn.Module = self.pipeline.transformer
        self._tokens = min(MAX_TOKENS, self.pipeline.tokenizer.model_max_length)
        self._negative: Conditioning | None = None

    def linears(self) -> tuple[LayerInfo, ...]:
        """Every linear of the transformer with its role."""
        return find_linears(self.denoiser)

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
            names = (
                "prompt_embeds",
                "prompt_attention_mask",
                "negative_prompt_embeds",
                "negative_prompt_attention_mask",
            )
            encoded.append(Conditioning(prompt, dict(zip(names, parts, strict=True))))
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

    @torch.no_grad()
    def encoder_features(self, pictures: np.ndarray) -> list[Tensor]:
        """Outputs of every stage of the autoencoder's encoder for pictures (n, height, width, 3) uint8, fp32 on the CPU."""
        vae, seen = self.pipeline.vae, []
        stages = (*vae.encoder.down_blocks, vae.encoder.mid_block)
        handles = [stage.register_forward_hook(lambda module, args, out: seen.append(out)) for stage in stages]
        try:
            values = torch.from_numpy(pictures).to(self.device, vae.dtype).permute(0, 3, 1, 2) / 127.5 - 1
            vae.encoder(values)
        finally:
            for handle in handles:
                handle.remove()
        return [feature.float().cpu() for feature in seen]

    @contextmanager
    def using(self, denoiser: nn.Module) -> Iterator[None]:
        """Sample with another transformer while the context is open."""
        original = self.pipeline.transformer
        self.pipeline.transformer = denoiser
        try:
            yield
        finally:
            self.pipeline.transformer = original

    def fingerprint(self) -> str:
        """A digest of weights and of how the scheduler is set."""
        settings = sorted(self.pipeline.scheduler.config.items(), key=lambda item: item[0])
        text = f"{weights_digest(self._files)}{self.dtype}{settings}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def layers_from_config(folder: Path) -> tuple[LayerInfo, ...]:
    """The transformer's linears from its config.json alone, built without memory on the meta device."""
    check_folder(folder, PIPELINES)
    try:
        config = PixArtTransformer2DModel.load_config(folder / "transformer")
        with torch.device("meta"):
            return find_linears(PixArtTransformer2DModel.from_config(config))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ModelError(
            f"model {folder.name}: transformer/config.json cannot be used ({reason}); copy the folder again."
        ) from error
