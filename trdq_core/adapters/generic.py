"""Any pipeline of diffusers whose denoiser is a transformer, sampled through its own stock call."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from trdq_core.adapters.branch_tags import tagged
from trdq_core.adapters.families import GuidanceLayout, family_of, known_time
from trdq_core.adapters.folder import check_folder
from trdq_core.adapters.pipelines import PipelineModel, check_full_precision
from trdq_core.adapters.probe import STEPS, Branches, Call, layout_of, time_of, traced_inputs
from trdq_core.adapters.prompts import Prompts, one_sentence
from trdq_core.adapters.roles import find_linears
from trdq_core.adapters.stock_call import (
    Answer,
    Halt,
    replaced,
    silent_denoiser,
)
from trdq_core.adapters.stock_run import StockRun
from trdq_core.errors import ModelError
from trdq_core.plan import LayerInfo
from trdq_core.sampling import ClipShape, Conditioning, OnStep
from trdq_core.specs import DEFAULT_LOADING, Loading
from trdq_core.timegroups import TimeArgument
from trdq_core.video_files import FPS


class TransformerModel(PipelineModel):
    """A pipeline with a transformer as something that can be calibrated and compared.

    `size` holds height and width in pixels and frames, where they are not the pipeline's own. Prompts are encoded once and
    kept; `provide` hands over embeddings, so a pipeline without text encoders will do.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None = None,
        size: Mapping[str, int] | None = None,
        loading: Loading = DEFAULT_LOADING,
    ) -> None:
        index = check_folder(folder, None)
        if not hasattr(diffusers, str(index["_class_name"])):
            raise ModelError(
                f"model {folder.name}: its pipeline {index['_class_name']} is not one of diffusers {diffusers.__version__}; "
                "pipelines with code of their own are not run, update diffusers if it is newer."
            )
        super().__init__(folder, None, name, loading)
        self._begin(size)

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, name: str, size: Mapping[str, int] | None = None) -> Self:
        """A pipeline that is loaded already, where it lies; ModelError if its denoiser is no transformer."""
        model = cls.__new__(cls)
        transformer = getattr(pipeline, "transformer", None)
        if not isinstance(transformer, nn.Module):
            unet = "a UNet" if getattr(pipeline, "unet", None) is not None else "none"
            raise ModelError(f"model {name}: its denoiser is {unet}; only transformer denoisers are quantized here.")
        model.name, model.pipeline, model._files = name, pipeline, []
        model._settle(next(transformer.parameters()).device, next(transformer.parameters()).dtype)
        model._begin(size)
        return model

    def check_size(self) -> None:
        """ModelError if the pipeline does not make pictures or clips of the size that was asked for."""
        size, taken = self._run.size, self._run.sizes_taken
        for name in size:
            if name not in taken:
                others = f"it takes {' and '.join(taken)}" if taken else "it makes one size only"
                raise ModelError(f"model {self.name}: its pipeline takes no {name}; {others}, leave --{name} out.")
        if size:
            asked = ", ".join(f"{name} {value}" for name, value in size.items())
            with one_sentence(f"model {self.name}: its pipeline does not make {asked}", "choose another size"):
                self.initial_latents(0)

    def _begin(self, size: Mapping[str, int] | None) -> None:
        self._run = StockRun(self.pipeline, size or {})
        self._prompts = Prompts(self._run, self.name, self.device, self.dtype)
        self._found: dict[str, Any] = {}  # what was probed, once

    # What there is

    def linears(self) -> tuple[LayerInfo, ...]:
        """Every linear of the transformer with its role. In families nobody has seen, shared inputs are traced in one call
        of the denoiser; in the others they follow from names, which a test compares with the trace. ModelError if it is
        quantized already."""
        check_full_precision(self.name, self.denoiser)
        if "linears" not in self._found:
            layers = find_linears(self.denoiser)
            self._found["linears"] = layers if family_of(self.denoiser) else self.traced(layers)
        return self._found["linears"]

    def traced(self, layers: Sequence[LayerInfo]) -> tuple[LayerInfo, ...]:
        """The layers with the leaders that one call of the denoiser shows."""

        def halt(*seen: Any) -> None:
            raise Halt

        def run() -> None:
            handle = self.denoiser.register_forward_hook(halt)
            try:
                self._run(self._prompts.any(), None, steps=1, guidance=1.0)
            except Halt:
                pass
            finally:
                handle.remove()

        return traced_inputs(self.denoiser, run, layers)

    @property
    def timestep_argument(self) -> TimeArgument:  # type: ignore[override]
        """How the denoiser is told the time: from the table of families, else found by a probe."""
        if "time" not in self._found:
            self._found["time"] = known_time(self.denoiser) or self.probed_time()
        return self._found["time"]

    def probed_time(self) -> TimeArgument:
        """What a run with a silent denoiser shows of the time axis."""
        return time_of(self._probe(1.0, self._prompts.any()), self.denoiser)

    @property
    def guidance_layout(self) -> GuidanceLayout:
        """How the pipeline runs the guidance branches."""
        if "layout" not in self._found:
            family = family_of(self.denoiser)
            self._found["layout"] = self.probed_layout() if family is None else family.layout
        return "embedded" if self._run.embeds_guidance else self._found["layout"]

    def probed_layout(self) -> GuidanceLayout:
        """What a run with a silent denoiser shows of the guidance branches."""
        different = self._prompts.noise()
        calls = self._probe(3.0, different)
        first = [call for call in calls if call.timestep == calls[0].timestep]
        return layout_of(first, Branches.of(different.tensors))

    def _probe(self, guidance: float, conditioning: Conditioning) -> list[Call]:
        """The calls of the denoiser in a few steps. Nothing is computed."""
        calls: list[Call] = []
        timesteps: list[float] = []

        def step(prediction: Any, timestep: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Answer:
            fresh = calls[len(timesteps) :]
            calls[len(timesteps) :] = [call._replace(timestep=float(timestep)) for call in fresh]
            timesteps.extend([float(timestep)] * len(fresh))
            return Answer((latents, latents))

        with (
            silent_denoiser(self.denoiser, lambda args, kwargs: calls.append(Call(args, kwargs, 0.0))),
            replaced(self.pipeline.scheduler, "step", step),
        ):
            self._run(conditioning, None, steps=STEPS, guidance=guidance)
        return calls

    # Prompts

    def provide(self, prompt: str, tensors: Mapping[str, Tensor]) -> None:
        """Hand over the embeddings of a prompt, by the names of the pipeline's call: (1, tokens, width) and so on."""
        self._prompts.provide(prompt, tensors)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Each prompt and the empty one as embeddings, as the pipeline's own call would encode them."""
        return self._prompts.encode(prompts)

    # Sampling

    @torch.no_grad()
    def initial_latents(self, seed: int) -> Tensor:
        """The latents that the pipeline itself would draw from a CPU generator of that seed, packed as it packs them."""
        if not hasattr(self.pipeline, "prepare_latents"):
            config, generator = self.denoiser.config, torch.Generator().manual_seed(seed)
            shape = (1, config.in_channels, config.sample_size, config.sample_size)
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)
        return self._draw(seed)[0]

    def _draw(self, seed: int) -> tuple[Tensor, dict[str, Any]]:
        """The latents that the pipeline draws, and the arguments it draws them with."""
        drawn: list[tuple[Tensor, dict[str, Any]]] = []

        def prepared(*args: Any, **kwargs: Any) -> None:
            made = before(*args, **kwargs)
            arguments = inspect.signature(before).bind(*args, **kwargs).arguments
            drawn.append((made[0] if isinstance(made, tuple) else made, arguments))
            raise Halt

        with replaced(self.pipeline, "prepare_latents", prepared) as before, suppress(Halt):
            self._run(self._prompts.any(), None, steps=1, guidance=1.0, seed=seed)
        return drawn[0]

    @property
    def clip(self) -> ClipShape | None:  # type: ignore[override]
        """Frames and pixels of its clips, None where it makes pictures."""
        if not {"num_frames", "video_length"} & set(self._run.taken):
            return None
        if "clip" not in self._found:
            told, family = self._draw(0)[1], family_of(self.denoiser)
            fps = (family.fps if family is not None else None) or FPS
            self._found["clip"] = ClipShape(told["num_frames"], told["height"], told["width"], fps)
        return self._found["clip"]

    @torch.no_grad()
    def denoise(
        self, conditioning: Conditioning, latents: Tensor, *, steps: int, guidance: float, on_step: OnStep
    ) -> Tensor:
        """Final latents, shaped as `initial_latents`; `on_step` sees them after every step and may raise to stop."""
        layout = self.guidance_layout if guidance > 1 else None
        with tagged(self.pipeline.transformer, layout, Branches.of(conditioning.tensors)) as end_of_step:

            def after(step: int, timestep: float, value: Tensor) -> None:
                end_of_step()
                on_step(step, timestep, value)

            return self._run(conditioning, latents.clone(), steps=steps, guidance=guidance, on_step=after)

    # Pictures

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """The picture (height, width, 3) or clip (frames, height, width, 3) uint8 that the stock call makes of latents."""
        self._check_autoencoder()

        def step(*args: Any, **kwargs: Any) -> Answer:
            both = torch.cat([latents] * (len(args[2]) // len(latents))) if len(args) > 2 else latents
            return Answer((both, both))

        with (
            silent_denoiser(self.denoiser, lambda args, kwargs: None),
            replaced(self.pipeline.scheduler, "step", step),
            self.using(self.denoiser),
            one_sentence(f"model {self.name}: its latents could not be decoded"),
        ):
            made = self._run(self._prompts.any(), latents.clone(), steps=1, guidance=1.0, output="np")
        values = np.asarray(made[0] if isinstance(made, (list, tuple, np.ndarray)) else made, dtype=np.float32)
        return np.rint(values.clip(0, 1) * 255).astype(np.uint8)

    def encoder_features(self, pictures: np.ndarray) -> list[Tensor]:
        """Outputs of every stage of the autoencoder's encoder for pictures (n, height, width, 3) uint8, fp32 on the CPU."""
        self._check_autoencoder()
        with one_sentence(f"model {self.name}: the encoder of its autoencoder shows no stages"):
            return super().encoder_features(pictures)

    def _check_autoencoder(self) -> None:
        if getattr(self.pipeline, "vae", None) is None:
            raise ModelError(
                f"model {self.name}: it was saved without its autoencoder, so there are no pictures; save the pipeline with it, "
                "or use profile, which needs none."
            )

    def fingerprint(self) -> str:
        """A digest of weights, size and of how the scheduler is set."""
        if self._files:
            return hashlib.sha256(f"{super().fingerprint()}{sorted(self._run.size.items())}".encode()).hexdigest()[:16]
        digest = hashlib.sha256(
            repr((sorted(self.pipeline.scheduler.config.items()), sorted(self._run.size.items()))).encode()
        )
        for name, value in self.denoiser.state_dict().items():
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}{value.double().sum().item()}".encode())
        return digest.hexdigest()[:16]
