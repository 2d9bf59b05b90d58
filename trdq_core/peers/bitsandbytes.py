"""bitsandbytes: LLM.int8(), activations per token at run time, channels with outliers multiplied in floating point."""

from __future__ import annotations

import logging

from torch import nn

from trdq_core.nn.modules import replace_module, tensor_bytes
from trdq_core.peers.base import Converted, Task
from trdq_core.peers.measures import file_bytes, held_bytes, kernels_of

OUTLIER_THRESHOLD = 6.0  # what transformers and diffusers hand it if nobody says otherwise


def convert(task: Task) -> Converted:
    """The denoiser with Linear8bitLt layers. It casts activations to FP16 before it quantizes them."""
    import bitsandbytes

    # It warns of that cast at every call of every layer.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    device = next(task.denoiser.parameters()).device
    scales = {}
    for name in task.layers:
        layer = task.denoiser.get_submodule(name)
        quantized = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None,
            has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta",
        )  # fmt: skip
        quantized.weight = bitsandbytes.nn.Int8Params(
            layer.weight.detach(), has_fp16_weights=False, requires_grad=False
        )
        if layer.bias is not None:
            quantized.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        quantized = quantized.to(device).eval()
        scales[name] = quantized.weight.SCB
        replace_module(task.denoiser, name, quantized)
    return Converted(
        task.denoiser,
        kernels_of(task.denoiser, task.example, task.layers),
        _weights(task.denoiser, task.layers) + tensor_bytes(scales.values()),
        held_bytes(task.denoiser) + tensor_bytes(scales.values()),  # the scales are no buffers of the layers
        file_bytes(task.denoiser),
    )


def _weights(denoiser: nn.Module, layers: tuple[str, ...]) -> int:
    return tensor_bytes(denoiser.get_submodule(name).weight for name in layers)
