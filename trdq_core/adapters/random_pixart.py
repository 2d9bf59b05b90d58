"""PixArt-alpha's XL transformer with random weights, whole or four layers of it: speed and memory at that width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from trdq_core.adapters.random_dit import RandomModel
from trdq_core.sampling import Conditioning

LAYERS = {"random-pixart-xl": 4, "random-pixart-xl-28": 28}
TEXT_TOKENS, TEXT_WIDTH = 120, 4096  # of the T5 encoder that PixArt-alpha reads


def build(layers: int, device: str = "cpu") -> PixArtTransformer2DModel:
    """16 heads of 72, 32x32 latents in patches of 2: 256 tokens, as PixArt-XL-2-256x256. Seeded; 0.6 B with 28 layers."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PixArtTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=layers,
            cross_attention_dim=1152, sample_size=32, patch_size=2, caption_channels=TEXT_WIDTH,
            use_additional_conditions=False,
        ).eval()  # fmt: skip


class RandomPixArt(RandomModel):
    """The random PixArt: made-up text embeddings in place of prompts, 1 token without text, 20 with."""

    def __init__(self, name: str) -> None:
        super().__init__(name, build(LAYERS[name]))

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Noise (2, 120, 4096) that follows from the text, and the mask of its tokens; the unconditional half first."""
        mask = torch.zeros(2, TEXT_TOKENS)
        mask[0, :1] = mask[1, :20] = 1
        found = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(prompt.encode()))
            text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
            tensors = {"text": text.to(self.device, self.dtype), "mask": mask.to(self.device, self.dtype)}
            found.append(Conditioning(prompt, tensors))
        return found

    def fingerprint(self) -> str:
        """The name of the construction: its weights follow from the seed."""
        return f"random-pixart-1-{LAYERS[self.name]}x1152-{self.dtype}"

    def _predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        # Joined conditionings come as pairs; the guided batch has all unconditional ones first.
        text, mask = (
            conditioning.tensors[name].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) for name in ("text", "mask")
        )
        output = self._active(
            hidden_states=latents,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output.chunk(2, dim=1)[0]  # the second half is a variance
