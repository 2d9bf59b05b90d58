"""What all pipelines of diffusers have in common here: loading with checks, linears, exchange of the denoiser, digest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from trdq_core.adapters.folder import check_folder, check_weights, weights_digest
from trdq_core.adapters.lora import fuse_lora
from trdq_core.adapters.precision import bring, choose_dtype, default_device, place
from trdq_core.adapters.quiet import without_progress_bars
from trdq_core.adapters.roles import find_linears
from trdq_core.checkpoints.before import quantization_of
from trdq_core.convert import Conversion
from trdq_core.errors import ModelError
from trdq_core.nn.modules import align
from trdq_core.plan import LayerInfo
from trdq_core.sampling import ClipShape
from trdq_core.specs import DEFAULT_LOADING, Loading, fused_name
from trdq_core.timegroups import TimeArgument


class PipelineModel:
    """A pipeline with a transformer, a decoder and a text encoder, loaded as `adapters.precision` says.

    Subclasses add what differs between families: encoding, initial latents, the call that denoises, decoding.
    """

    timestep_argument: TimeArgument | str = "timestep"
    clip: ClipShape | None = None  # families that make clips say so

    def __init__(
        self,
        folder: Path,
        pipelines: Sequence[str] | None,
        name: str | None = None,
        loading: Loading = DEFAULT_LOADING,
    ) -> None:
        index = check_folder(folder, pipelines)
        absent = {part: None for part, kind in index.items() if kind == [None, None]}  # saved without, loaded without
        self._files = sorted((folder / "transformer").glob("*.safetensors"))
        check_weights(self._files, folder)
        self.name = name or folder.name
        device = torch.device(default_device())
        dtype = getattr(torch, choose_dtype(folder, loading.dtype, device.type))
        try:
            with without_progress_bars():
                self.pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **absent)
            _check_complete(self.pipeline, folder.name)
            place(self.pipeline, device, loading.offload)
        except ModelError:
            raise
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(
                f"model {folder.name}: diffusers could not load it ({reason}); copy the folder again."
            ) from error
        self._settle(device, dtype)

    def _settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """What every pipeline needs once it lies where it runs."""
        self.device, self.dtype = device, dtype
        self._fused: tuple[object, ...] = ()
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        align(self.pipeline.transformer)  # so that it gives the same bits from whatever file it came
        self.denoiser: nn.Module = self.pipeline.transformer
        align(self.denoiser)

    def linears(self) -> tuple[LayerInfo, ...]:
        """Every linear of the transformer with its role; ModelError if it is quantized already."""
        check_full_precision(self.name, self.denoiser)
        return find_linears(self.denoiser)

    @torch.no_grad()
    def encoder_features(self, pictures: np.ndarray) -> list[Tensor]:
        """Outputs of every stage of the autoencoder's encoder for pictures (n, height, width, 3) uint8, fp32 on the CPU."""
        vae, seen = bring(self.pipeline.vae), []
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

    def fuse_lora(self, file: str | Path, scale: float = 1.0) -> None:
        """Add a LoRA to the weights before anything is measured or quantized; `trdq_core.adapters.lora` says what is refused."""
        fuse_lora(self.pipeline, file, scale)
        self._fused += (weights_digest([Path(file)]), scale)
        self.name = fused_name(self.name, file)
        align(self.denoiser)

    def fingerprint(self) -> str:
        """A digest of weights, LoRAs fused into them, and of how the scheduler is set."""
        settings = sorted(self.pipeline.scheduler.config.items(), key=lambda item: item[0])
        fused = self._fused or ""  # nothing, so that statistics stored before there were any are found
        text = f"{weights_digest(self._files)}{self.dtype}{settings}{fused}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_full_precision(model: str, denoiser: nn.Module) -> None:
    """ModelError if a denoiser is quantized, by this library or another: there are no weights left to look at."""
    conversion = getattr(denoiser, "trdq_conversion", None)
    config = getattr(denoiser, "config", {}).get("quantization_config")
    if isinstance(conversion, Conversion) and conversion.recipe.quantized:
        refuse_quantized(model, conversion.recipe.name)
    if config is not None and not isinstance(conversion, Conversion):
        refuse_quantized(model, str(getattr(config, "quant_method", "another method"))[:40])


def refuse_quantized(model: str, recipe: str) -> NoReturn:
    """Say of a quantized model why it is neither planned, calibrated, compared nor converted."""
    raise ModelError(
        f"model {model}: this model is quantized already, with {recipe}; give the full-precision one. It can be sampled as it "
        "is, with the sample command or with diffusers."
    )


def _check_complete(pipeline: DiffusionPipeline, model: str) -> None:
    """ModelError if a tensor of some part was in none of its files: diffusers leaves it without memory."""
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            tensors = itertools.chain(module.named_parameters(), module.named_buffers())
            missing = next((name for name, tensor in tensors if tensor.is_meta), None)
            if missing is not None:
                raise ModelError(f"model {model}: {missing} is in no file of its {part}; copy the folder again.")


def linears_from_config(folder: Path, pipelines: Sequence[str], transformer: type[ModelMixin]) -> tuple[LayerInfo, ...]:
    """The transformer's linears from its config.json alone, built without memory on the meta device."""
    return find_linears(transformer_from_config(folder, pipelines, transformer))


def transformer_from_config(folder: Path, pipelines: Sequence[str] | None, transformer: type[ModelMixin]) -> nn.Module:
    """The transformer of a folder from its config.json alone, without weights, on the meta device."""
    check_folder(folder, pipelines)
    recipe = quantization_of(folder / "transformer")
    if recipe is not None:
        refuse_quantized(folder.name, recipe)
    try:
        config = transformer.load_config(folder / "transformer")
        with torch.device("meta"):
            return transformer.from_config(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ModelError(
            f"model {folder.name}: transformer/config.json cannot be used ({reason}); copy the folder again."
        ) from error
