"""In which precision a pipeline is loaded, and what of it waits in the machine's memory while others use the GPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trdq_core.errors import ModelError
from trdq_core.specs import Loading

if TYPE_CHECKING:  # the memory check asks for a precision before torch or diffusers are needed
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

DtypeName = Literal["float32", "float16", "bfloat16"]
NAMES: dict[str, DtypeName] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BYTES: dict[DtypeName, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
# Transformers whose pipelines diffusers' documentation runs in bfloat16: activations of some leave the range of float16.
# Counts only where weights are stored in float32; what is stored in two bytes runs as it is stored.
RUN_IN_BFLOAT16 = frozenset({
    "FluxTransformer2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel", "CogView4Transformer2DModel",
    "QwenImageTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
})  # fmt: skip


def default_device() -> Literal["cpu", "cuda"]:
    """Where models run: a GPU if torch sees one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(folder: Path, asked: str, device: str) -> DtypeName:
    """The precision of the weights of a diffusers folder: the one that is `asked`, a name of Loading.dtype.

    "auto" is float32 on a CPU. On a GPU it is the half precision that the transformer is stored in; where it is stored in
    float32, bfloat16 for families that are run in it and float16 for others. A GPU without bfloat16 gets float32 for it.
    """
    if asked != "auto":
        return NAMES[asked]
    if device == "cpu":
        return "float32"
    stored = stored_dtype(folder)
    if stored == "F16" or (stored != "BF16" and _transformer_class(folder) not in RUN_IN_BFLOAT16):
        return "float16"
    return "bfloat16" if _gpu_has_bfloat16() else "float32"


def stored_dtype(folder: Path) -> str | None:
    """The dtype that most tensors of a folder's transformer have, as safetensors calls it: "BF16". None if none is readable."""
    from safetensors import SafetensorError, safe_open

    seen: Counter[str] = Counter()
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        try:
            with safe_open(file, "np") as stored:
                seen.update(stored.get_slice(key).get_dtype() for key in stored.keys())  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError):
            continue  # loading says what is wrong with it
    return seen.most_common(1)[0][0] if seen else None


def _transformer_class(folder: Path) -> str:
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["transformer"][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""  # checking the folder says what is wrong with it


def _gpu_has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def check_loading(model: str, folder: Path | None, loading: Loading, device: str) -> None:
    """ModelError where a way of loading is asked for that is of no use here."""
    if folder is None and loading != Loading():
        asked = f"--dtype {loading.dtype}" if loading.dtype != "auto" else f"--offload {loading.offload}"
        raise ModelError(f"model {model}: got {asked}, and it is made of random weights here; leave the flag out.")
    if loading.offload != "none" and device == "cpu":
        raise ModelError(
            f"--offload {loading.offload}: there is no GPU on this machine to offload from; leave it out, and use --dtype bf16 "
            "if memory is short."
        )


def place(pipeline: DiffusionPipeline, device: torch.device, offload: str) -> None:
    """Move a pipeline to `device`, all of it or only its transformer; then the other parts come when they are called.

    The transformer stays on the device either way: it is what is observed, quantized and timed, and a hook that moves it
    would be part of every copy.
    """
    from torch import nn

    if offload == "none":
        pipeline.to(device)
        return
    pipeline.transformer.to(device)
    # Where the pipeline looks which device it runs on, it skips these and finds the hooks of the others.
    pipeline._exclude_from_cpu_offload = [*pipeline._exclude_from_cpu_offload, "transformer"]
    named = [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    others = [part for name, part in named if name != "transformer"]
    if offload == "sequential":
        from accelerate import cpu_offload

        for part in others:
            cpu_offload(part, device, offload_buffers=bool(part._parameters))
    else:
        _one_at_a_time(others, device)


def _one_at_a_time(parts: list[nn.Module], device: torch.device) -> None:
    """Let each part move to `device` when it is called, and the others away."""
    from accelerate.hooks import ModelHook, add_hook_to_module
    from accelerate.utils import send_to_device

    class OneAtATime(ModelHook):
        execution_device = device

        def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[object, object]:
            for part in parts:
                part.to(device if part is module else "cpu")
            return send_to_device(args, device), send_to_device(kwargs, device)

    for part in parts:
        part.to("cpu")
        add_hook_to_module(part, OneAtATime())


def bring(part: nn.Module) -> nn.Module:
    """`part`, on its device: hooks wait for calls of the part itself, so one whose children are called is told first."""
    hook = getattr(part, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(part)
    return part
