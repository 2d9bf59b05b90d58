"""torchao: int8 weights per channel, activations per token at run time, through its tensor subclass."""

from __future__ import annotations

from torch import nn

from trdq_core.peers.base import Converted, Task
from trdq_core.peers.measures import file_bytes, held_bytes, kernels_of, weight_bytes
from trdq_core.peers.torch_compile import compile_for


def convert(task: Task) -> Converted:
    """The denoiser with Int8DynamicActivationInt8WeightConfig on its linears, compiled if the peer's name says so."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    # The setter changes Inductor and the precision of float32 products for the whole process, so for other columns too;
    # what it sets is for GPUs.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    chosen = set(task.layers)
    quantize_(task.denoiser, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name in chosen)
    module = task.denoiser
    if task.peer.name.endswith("compile"):
        module = compile_for(task.denoiser, task.example)
    return Converted(
        module,
        kernels_of(module, task.example, task.layers),
        weight_bytes(task.denoiser, task.layers),
        held_bytes(task.denoiser),
        file_bytes(task.denoiser),
    )
