"""OpenVINO on the CPU: as it is, with int8 weights (NNCF), and with static INT8 for linears and attention (NNCF).

One graph is compiled for each set of input shapes, since fixed shapes are what it is fastest with.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trdq_core.errors import PeerError
from trdq_core.peers.base import Call, Converted, Task

DYNAMIC_GROUP = 32  # channels of an activation that share a scale, where only weights are stored in int8
ROOT = "__module.denoiser."  # what its names of operations start with
_TYPES = {"i8": "int8", "u8": "int8", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convert(task: Task) -> Converted:
    """The denoiser as a compiled graph. PeerError on a GPU, or where the chip has no bfloat16 and the peer's name has it."""
    inputs = tensors_of(task.example)
    if any(tensor.device.type != "cpu" for tensor in inputs):
        raise PeerError(
            f"peer-{task.peer.name}: OpenVINO runs on the CPU here and this model is on a GPU; leave it out."
        )
    seconds = 0.0
    with without_telemetry():
        graph = _trace(task, inputs)
        if task.peer.name == "openvino-int8-weights":
            graph = _with_int8_weights(task, graph)
        elif task.peer.static:
            started = time.perf_counter()
            graph = _with_static_int8(task, graph, inputs)
            seconds = time.perf_counter() - started
    module = CompiledGraph(graph, task.example, _options(task.peer.name))
    module(**task.example)
    if task.peer.name == "openvino-bf16" and module.precision() != "bf16":
        raise PeerError(
            f"peer-{task.peer.name}: this chip has no bfloat16 that OpenVINO uses; take peer-openvino-fp32."
        )
    weights = None if task.peer.weight_bits is None else integer_bytes(graph)
    return Converted(module, module.kernels(), weights, constant_bytes(graph), _file_bytes(graph), seconds)


def tensors_of(call: Call) -> list[Tensor]:
    """The tensors among the arguments of a call, in the order of the graph's inputs."""
    return [leaf for leaf in pytree.tree_leaves(_by_name(call)) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Its Python tools report what they convert over the network, except in continuous integration."""
    settings = {"CI": "true", "NNCF_CI": "true"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class CompiledGraph(nn.Module):
    """A graph that takes the denoiser's keyword arguments and answers with a tuple. Arguments that are no tensors are fixed."""

    def __init__(self, graph: Any, example: Call, options: Mapping[str, str]) -> None:
        super().__init__()
        import openvino

        self._core, self._graph, self._options = openvino.Core(), graph, dict(options)
        self._options["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
        self._fixed = _fixed(example)
        self._compiled: dict[tuple[torch.Size, ...], Any] = {}

    def forward(self, **kwargs: Any) -> tuple[Tensor]:
        if _fixed(kwargs) != self._fixed:
            raise PeerError("openvino: the arguments of a call changed in more than its tensors; leave it out.")
        tensors = tensors_of(kwargs)
        found = self._for_shapes(tuple(tensor.shape for tensor in tensors))
        return (torch.from_numpy(found([tensor.contiguous().numpy() for tensor in tensors])[0]),)

    def precision(self) -> str:
        """The type of what is not quantized: "f32", "bf16"."""
        text = str(self._last().get_property("INFERENCE_PRECISION_HINT").get_type_name())
        return text

    def kernels(self) -> dict[str, int]:
        """How many products ran in which type, read from the graph that the CPU plugin made."""
        found: dict[str, int] = {}
        for node in self._last().get_runtime_model().get_ops():
            info = {
                key: node.rt_info[key].astype(str) for key in ("layerType", "runtimePrecision") if key in node.rt_info
            }
            if info.get("layerType") in ("FullyConnected", "MatMul", "ScaledDotProductAttention"):
                words = f"OpenVINO {info['layerType']} {_TYPES.get(info.get('runtimePrecision', ''), 'unknown type')}"
                found[words] = found.get(words, 0) + 1
        return found

    def _last(self) -> Any:
        return next(reversed(self._compiled.values()))

    def _for_shapes(self, shapes: tuple[torch.Size, ...]) -> Any:
        if shapes not in self._compiled:
            graph = self._graph.clone()
            graph.reshape({index: list(shape) for index, shape in enumerate(shapes)})
            self._compiled[shapes] = self._core.compile_model(graph, "CPU", self._options)
        return self._compiled[shapes]


class _Positional(nn.Module):
    """The denoiser with its tensors as positional arguments, which is what can be traced."""

    def __init__(self, denoiser: nn.Module, example: Call) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._leaves, self._structure = pytree.tree_flatten(_by_name(example))

    def forward(self, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return self.denoiser(**pytree.tree_unflatten(leaves, self._structure))[0]


def _by_name(call: Call) -> Call:
    """The arguments sorted by name: the order of the graph's inputs must not depend on that of a call."""
    return {name: call[name] for name in sorted(call)}


def _fixed(call: Call) -> list[Any]:
    """What is no tensor among the arguments of a call, and where it stands."""
    leaves, structure = pytree.tree_flatten(_by_name(call))
    return [structure, *(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)]


def _trace(task: Task, inputs: Sequence[Tensor]) -> Any:
    import openvino

    example = {**task.example, "return_dict": False} if "return_dict" in task.example else task.example
    with torch.no_grad():
        return openvino.convert_model(_Positional(task.denoiser, example), example_input=tuple(inputs))


def _options(name: str) -> dict[str, str]:
    options = {"PERFORMANCE_HINT": "LATENCY"}
    if name.endswith("fp32"):
        options["INFERENCE_PRECISION_HINT"] = "f32"
    if name.endswith("bf16"):
        options["INFERENCE_PRECISION_HINT"] = "bf16"
    if name.endswith("weights"):
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(DYNAMIC_GROUP)
    return options


def _ignored(task: Task, graph: Any) -> Any:
    """Every product with a weight that is not to be quantized; products of two activations stay NNCF's to choose."""
    import nncf

    if task.every:
        return nncf.IgnoredScope()
    weighted = {name for name, module in task.denoiser.named_modules() if isinstance(module, WEIGHTED)}
    left = weighted - set(task.layers)
    names = [
        node.get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() in ("MatMul", "Convolution")
        and node.get_friendly_name().removeprefix(ROOT).partition("/")[0] in left
    ]
    return nncf.IgnoredScope(names=names, validate=False)


def _with_int8_weights(task: Task, graph: Any) -> Any:
    import nncf

    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=_ignored(task, graph))


def _with_static_int8(task: Task, graph: Any, inputs: Sequence[Tensor]) -> Any:
    """NNCF's quantization for transformers: SmoothQuant, fixed ranges from the calibration calls, bias correction."""
    import nncf

    calls = [tensors_of(call) for call in task.calls()]
    # Ranges are the same for every batch size, and with fixed shapes NNCF runs the calls much faster.
    graph.reshape({index: list(tensor.shape) for index, tensor in enumerate(inputs)})
    dataset = nncf.Dataset([[tensor.contiguous().numpy() for tensor in call] for call in calls])
    return nncf.quantize(
        graph,
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calls),
        ignored_scope=_ignored(task, graph),
    )


def constant_bytes(graph: Any) -> int:
    """Bytes of all constants of a graph. The plugin packs its own copy of them, which only peak memory shows."""
    return sum(node.data.nbytes for node in graph.get_ops() if node.get_type_name() == "Constant")


def integer_bytes(graph: Any) -> int:
    """Bytes of the weights in 8-bit integers, with the scales and zero points they are multiplied out with."""
    total = 0
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and node.data.ndim > 1 and node.data.dtype in (np.int8, np.uint8):
            total += node.data.nbytes + sum(_scale_bytes(use.get_node()) for use in node.output(0).get_target_inputs())
    return total


def _scale_bytes(node: Any) -> int:
    """Constants of the Subtract and Multiply that follow the Convert of a weight."""
    total = 0
    while node.get_type_name() in ("Convert", "Subtract", "Multiply"):
        others = [value.get_node() for value in node.input_values()]
        total += sum(other.data.nbytes for other in others[1:] if other.get_type_name() == "Constant")
        node = next(iter(node.output(0).get_target_inputs())).get_node()
    return total


def _file_bytes(graph: Any) -> int:
    """Bytes of the two files it saves, weights left in the type they have."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(graph, Path(folder) / "denoiser.xml", compress_to_fp16=False)
        return sum(file.stat().st_size for file in Path(folder).iterdir())
