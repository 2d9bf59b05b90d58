"""LoRAs: fused into a full-precision pipeline before it is quantized, and refused for one that is quantized."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from trdq_core.convert import Conversion
from trdq_core.errors import ModelError

_ADAPTER = "fused"


def refuse_lora(*_: object, **__: object) -> NoReturn:
    """What loading a LoRA onto a quantized denoiser does."""
    raise ModelError(
        "LoRA: this model is quantized, and adapters need its full-precision weights; load the LoRA onto the original "
        "pipeline, call fuse_lora() and unload_lora_weights(), then quantize."
    )


def fuse_lora(pipeline: Any, file: str | Path, scale: float = 1.0) -> None:
    """Add the LoRA in a safetensors `file`, times `scale`, to the weights of a full-precision pipeline of diffusers.

    What is left are plain linears with other weights, to be quantized like any. diffusers and peft read the file. ModelError
    for a quantized pipeline, one that takes no LoRA, a file that is none or of another model, and where peft is missing.
    """
    path = Path(file)
    if _is_quantized(pipeline):
        refuse_lora()
    _check_file(path)
    if not math.isfinite(scale):
        raise ModelError(f"LoRA {path.name}: got scale {scale}; give a number, 1 adds it as it was trained.")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(
            f"LoRA {path.name}: {type(pipeline).__name__} takes no LoRA in diffusers; choose another model."
        )
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"LoRA {path.name}: reading one takes another package; install it with pip install peft.")
    try:
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=_ADAPTER, local_files_only=True
        )
        if _ADAPTER not in pipeline.get_list_adapters().get("transformer", ()):
            raise ModelError(
                f"LoRA {path.name}: none of its layers is in this model's transformer; choose one made for it."
            )
        pipeline.fuse_lora(lora_scale=scale, adapter_names=[_ADAPTER], safe_fusing=True)
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(
            f"LoRA {path.name}: diffusers could not load it ({reason}); choose one made for this model."
        ) from error
    finally:
        pipeline.unload_lora_weights()


def _check_file(path: Path) -> None:
    if path.suffix != ".safetensors" or not path.is_file():
        raise ModelError(f"LoRA: got {path.name!r:.100}; give a safetensors file that is there, pickles are not read.")
    try:
        with safe_open(path, "pt") as stored:
            names = list(stored.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"LoRA {path.name}: it cannot be read ({str(error)[:100]}); copy it again.") from error
    if not any("lora" in name for name in names):
        raise ModelError(f"LoRA {path.name}: none of its tensors is one of a LoRA; give the file of one.")


def _is_quantized(pipeline: Any) -> bool:
    return isinstance(getattr(getattr(pipeline, "transformer", None), "trdq_conversion", None), Conversion)


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
        if _is_quantized(self):
            refuse_lora()
        return load(self, *args, **kwargs)

    load_lora_weights.trdq_guarded = True
    return load_lora_weights
