"""LoRAs: fused into a full-precision pipeline before it is quantized, and refused for one that is quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from trdq_core.convert import Conversion
from trdq_core.errors import ModelError


def refuse_lora(*_: object, **__: object) -> NoReturn:
    """What loading a LoRA onto a quantized denoiser does."""
    raise ModelError(
        "LoRA: this model is quantized, and adapters need its full-precision weights; load the LoRA onto the original "
        "pipeline, call fuse_lora() and unload_lora_weights(), then quantize."
    )


def guard_loaders(module: ModuleType) -> None:
    """Have every `load_lora_weights` in `diffusers.loaders.lora_pipeline` refuse a pipeline with a quantized transformer.

    Those methods look into the transformer, and some write norms into it, before they hand it the LoRA: refusing there would
    be too late.
    """
    for kind in vars(module).values():
        if isinstance(kind, type) and "load_lora_weights" in vars(kind):
            kind.load_lora_weights = _guarded(kind.load_lora_weights)


def _guarded(load: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(load, "trdq_guarded"):
        return load

    @functools.wraps(load)
    def load_lora_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(getattr(self, "transformer", None), "trdq_conversion", None), Conversion):
            refuse_lora()
        return load(self, *args, **kwargs)

    load_lora_weights.trdq_guarded = True
    return load_lora_weights
