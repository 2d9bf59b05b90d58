"""Which backend runs, and the kernels through it; the only kernel module that layers and reports need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trdq_core.errors import BackendUnavailable
from trdq_core.kernels import (
    build,
    capabilities,
    cpu,
    native,
    packing,
    reference,
    torch_eager,
    triton_gpu,
    triton_selftest,
)
from trdq_core.kernels.packing import unpack_weight
from trdq_core.kernels.surroundings import apply_epilogue, apply_prologue
from trdq_core.kernels.types import (
    NO_STAGES,
    Epilogue,
    InputStages,
    PackedWeight,
    Prologue,
    QuantizedActivation,
    StaticGrid,
)

Backend = Literal["reference", "torch", "cpp", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

__all__ = [
    "BACKENDS",
    "Backend",
    "describe",
    "int8_attention_name",
    "is_simulated",
    "kernel_name",
    "linear",
    "linear_from_float",
    "linears_from_float",
    "pack_weight",
    "quantize_activation",
    "select_backend",
    "transform",
    "unpack_weight",
]

_PATH_NAMES = {"avx512-vnni": "VNNI", "avx2": "AVX2", "portable": "portable C++"}
_MODULES: dict[Backend, ModuleType] = {"reference": reference, "torch": torch_eager, "cpp": cpu, "triton": triton_gpu}


def select_backend(device: torch.device, explicit: Backend | None = None) -> Backend:
    """The backend for tensors on `device`: `explicit` if it can run there, else the fastest that can.

    BackendUnavailable says what an explicit choice lacks. Without one, "cpp" needs a CPU with AVX512-VNNI or AVX2: its
    portable path is right but slower than float32, so other machines get "torch". GPUs get "triton" where it runs.
    """
    if explicit is None:
        fastest: Backend = "cpp" if device.type == "cpu" else "triton"
        return fastest if _fallback_reason(device) is None else "torch"
    if explicit not in BACKENDS:
        raise BackendUnavailable(f"backend={explicit!r} is unknown; use one of {', '.join(BACKENDS)}.")
    if explicit == "cpp":
        if device.type != "cpu":
            raise BackendUnavailable(f'backend "cpp" runs on the CPU only, not on {device}; use "torch" there.')
        reason = cpu.unavailable_reason()
        if reason is not None:
            raise BackendUnavailable(f'backend "cpp" cannot run: {reason}')
    if explicit == "triton":
        reason = triton_selftest.unavailable_reason(device)
        if reason is not None:
            raise BackendUnavailable(f'backend "triton" cannot run: {reason}')
    return explicit


def pack_weight(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    group_scale: Tensor | None = None,
    bits: int = 8,
    *,
    backend: Backend | None = None,
) -> PackedWeight:
    """`packing.pack_weight`, in the layout that `backend` multiplies with: rows for "triton", panels for all others."""
    packed = packing.pack_weight(q, scale, zero_point, group_scale, bits)
    return packing.to_rows(packed) if backend == "triton" else packed


def transform(x: Tensor, stages: InputStages = NO_STAGES, *, backend: Backend | None = None) -> Tensor:
    """T(x) for x of (..., in_features), same shape and dtype."""
    return _module(x, backend).transform(x, stages)


def quantize_activation(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
    *,
    backend: Backend | None = None,
) -> QuantizedActivation:
    """Levels of T(x) for x of (..., in_features); see `reference.quantize_activation` for the grid."""
    return _module(x, backend).quantize_activation(x, stages, bits, symmetric, static, clip)


def linear(
    activation: QuantizedActivation,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    backend: Backend | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(tokens, out_features) in `dtype`; see `reference.linear` for the formula."""
    module = _module(activation.values, backend)
    if module is triton_gpu:  # it rounds once, where it writes: half the bytes for the half types
        return triton_gpu.linear(activation, weight, bias, dtype)
    return module.linear(activation, weight, bias).to(dtype)


def linear_from_float(
    x: Tensor,
    stages: InputStages,
    weight: PackedWeight,
    bias: Tensor | None,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """(..., out_features) in the dtype of x, (..., in_features): quantization of T(x), then the product."""
    return linears_from_float(x, stages, [(weight, bias)], bits, symmetric, static, clip, backend=backend)


def linears_from_float(
    x: Tensor,
    stages: InputStages,
    weights: Sequence[tuple[PackedWeight, Tensor | None]],
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
    *,
    prologue: Prologue | None = None,
    epilogue: Epilogue | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """(..., sum of out_features): the products of one input, quantized once, with weights and their biases, side by side.

    A prologue comes before T, an epilogue after the products; the C++ and the Triton kernels do all of it in the same
    passes.
    """
    module = _module(x, backend)
    if module is cpu or module is triton_gpu:
        y = module.linears_from_float(x, stages, weights, bits, symmetric, static, clip, prologue, epilogue)
    else:
        if prologue is not None:
            x = apply_prologue(x.flatten(0, -2), prologue).view_as(x)
        levels = module.quantize_activation(x, stages, bits, symmetric, static, clip)
        parts = [module.linear(levels, weight, bias) for weight, bias in weights]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        y = y if epilogue is None else apply_epilogue(y, epilogue)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def kernel_name(
    bits: int,
    activation_bits: int,
    backend: Backend,
    device: str = "cpu",
    *,
    in_features: int = 64,
    group_size: int = 0,
) -> str:
    """What multiplies weights of `bits` with activations of `activation_bits`, in words for a report.

    A size that the C++ product does not take runs through torch, and is named so.
    """
    storage = "int4 packed" if bits <= 4 else "int8"
    levels = "" if activation_bits == 8 else f", {activation_bits}-bit levels"
    if backend == "reference":
        return f"reference float64{levels}"
    if backend == "triton":
        return f"{storage} Triton{levels}" + (" (interpreted)" if triton_gpu.interpreted() else "")
    if backend == "cpp" and cpu.fits_panels(in_features, group_size):
        return f"{storage} {_PATH_NAMES.get(native.path(), 'unavailable')}{levels}"
    return f"torch {'_int_mm' if _integer_product(device) else 'float32 (dequantized)'}{levels}"


def int8_attention_name() -> str:
    """What multiplies the int8 products of the C++ attention, in words for a report."""
    return f"int8 attention {_PATH_NAMES.get(native.path(), 'unavailable')}"


def is_simulated(backend: Backend, device: str = "cpu", *, in_features: int = 64, group_size: int = 0) -> bool:
    """Whether the product of such a layer runs in floating point, so that its time says nothing of a real kernel."""
    if backend == "reference":
        return True
    if backend == "triton":
        return triton_gpu.interpreted()  # select_backend let it through, so a GPU with int8 units runs it
    if backend == "cpp" and cpu.fits_panels(in_features, group_size):
        return False
    return not _integer_product(device)


def _integer_product(device: str) -> bool:
    sizes = {"in_features": 64, "out_features": 64}  # any that the call takes: what counts is the chip
    return torch_eager.has_integer_product(torch.device(device), **sizes)


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """The backend for `device` (CPU if none), the CPU's features, the build and why not the fastest: JSON values."""
    device = device or torch.device("cpu")
    capability = capabilities.capability_of(device)
    found = native.loaded()
    seconds = math.nan if found is None else found.library.build_seconds
    return {
        "backend": select_backend(device),
        "fallback_reason": _fallback_reason(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "capability": None if capability is None else ".".join(map(str, capability)),
        "cpu_features": list(build.cpu_features()),
        "path": native.path(),
        "vectorised": native.path() == "avx512-vnni",
        "compiler": None if found is None else found.library.compiler,
        "build_seconds": None if math.isnan(seconds) else seconds,
        "torch": str(torch.__version__),
    }


def _module(x: Tensor, backend: Backend | None) -> ModuleType:
    return _MODULES[backend or _automatic(x.device.type)]


# Constant under torch.compile: the choice does not change while a process lives, and building is not traceable.
@torch.compiler.assume_constant_result
def _automatic(device_type: str) -> Backend:
    return select_backend(torch.device(device_type))


def _fallback_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return triton_selftest.unavailable_reason(device)
    reason = cpu.unavailable_reason()
    if reason is None and native.path() == "portable":
        return "This CPU has neither AVX512-VNNI nor AVX2, and without them the C++ kernels are slower than torch."
    return reason
