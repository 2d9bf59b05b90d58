"""SDNQ: int8 weights per channel, activations per token at run time, on request behind a Hadamard rotation.

On a CPU it multiplies through OpenVINO where that is installed, else through torch._int_mm, and compiles each layer.
"""

from __future__ import annotations

from torch import nn

from trdq_core.nn.modules import replace_module
from trdq_core.peers.base import Converted, Task
from trdq_core.peers.measures import file_bytes, held_bytes, kernels_of, weight_bytes


def convert(task: Task) -> Converted:
    """The denoiser with its linears quantized; those that SDNQ finds too small stay as they are."""
    from sdnq.quantizer import SDNQConfig, sdnq_quantize_layer
    from sdnq.utils import check_quant_is_allowed

    device = next(task.denoiser.parameters()).device
    config = SDNQConfig(
        weights_dtype="int8",
        use_quantized_matmul=True,
        use_hadamard=task.peer.name.endswith("hadamard"),
        quantization_device=device,
        return_device=device,
        add_skip_keys=False,  # the layers are chosen here
    )
    taken = []
    for name in task.layers:
        layer = task.denoiser.get_submodule(name)
        if not check_quant_is_allowed(type(layer).__name__, layer.weight, config):
            continue
        # It works on the tensor that it is handed, which here belongs to the original.
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        quantized, config = sdnq_quantize_layer(layer, config, param_name=f"{name}.weight")
        replace_module(task.denoiser, name, quantized)
        taken.append(name)
    return Converted(
        task.denoiser,
        kernels_of(task.denoiser, task.example, taken),
        weight_bytes(task.denoiser, task.layers),
        held_bytes(task.denoiser),
        file_bytes(task.denoiser),
    )
