"""The calls that `benchmarks.kernels` times at one shape, each with the least work that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.kernels import cpu, dispatch
from trdq_core.kernels.observing import Work, observed
from trdq_core.kernels.types import NO_STAGES, Epilogue, InputStages, PackedWeight, Prologue

GROUP = 128
BLOCK = 128
ITEMS = 2  # the two halves of a guidance batch
HEAD = 64


class Case(NamedTuple):
    """One call to time, the name of the kernel that runs in it, and its least work where that is known."""

    name: str
    kernel: str
    call: Callable[[], object]
    work: Work | None = None


def linear_cases(tokens: int, width: int, outputs: int) -> list[Case]:
    """The float32 linear as torch runs it, other floating-point linears, the integer ones, and their parts.

    The first is what speeds are given against. oneDNN with a prepacked weight is the best that float32 can do (on AMD,
    `F.linear` leaves half of the units unused).
    """
    torch.manual_seed(0)
    x, bias, weight = torch.randn(tokens, width), torch.randn(outputs), torch.randn(outputs, width)
    least = Work("float32", 0, 2 * tokens * width * outputs, 4 * (x.numel() + weight.numel() + tokens * outputs))
    half = [part.bfloat16() for part in (x, weight, bias)]
    compiled = torch.compile(functional.linear)
    return [
        Case("float32 F.linear", "torch", lambda: functional.linear(x, weight, bias), least),
        Case("float32 F.linear, compiled", "torch.compile", lambda: compiled(x, weight, bias), least),
        Case("float32, prepacked", "oneDNN", _prepacked_call(x, weight, bias), least),
        Case("bfloat16 F.linear", "torch", lambda: functional.linear(*half)),
        *_integer_cases(x, bias, weight),
    ]


def attention_cases(tokens: int, width: int) -> list[Case]:
    """Attention over `tokens` split into two items, as heads of 64; torch's comes first."""
    torch.manual_seed(0)
    heads = max(width // HEAD, 1)
    q, k, v = (torch.randn(ITEMS, tokens // ITEMS, heads * HEAD) for _ in range(3))

    def of_torch() -> Tensor:
        parts = [part.unflatten(-1, (heads, HEAD)).transpose(1, 2) for part in (q, k, v)]
        return functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

    ours = _seen("attention, float32", lambda: cpu.attend(q, k, v, heads))
    return [
        Case("float32 attention of torch", "torch", of_torch, ours.work),
        ours,
        _seen("attention, int8 products", lambda: cpu.attend(q, k, v, heads, bits=8)),
    ]


def _integer_cases(x: Tensor, bias: Tensor, weight: Tensor) -> list[Case]:
    tokens, width = x.shape
    int8, int4, from_float = _pack_int8(weight), _pack_int4(weight), dispatch.linear_from_float
    levels = dispatch.quantize_activation(x, NO_STAGES, 8, True)
    hadamard = InputStages(torch.rand(width) + 0.5, hadamard_block=BLOCK)
    rotations = _two_rotations(width)
    norm = Prologue("norm", torch.randn(ITEMS, width), torch.randn(ITEMS, width), 1e-6)
    residual = Epilogue(torch.randn(tokens, len(weight)), torch.randn(ITEMS, len(weight)))

    def fused(prologue: Prologue | None = None, epilogue: Epilogue | None = None) -> Callable[[], object]:
        around = {"prologue": prologue, "epilogue": epilogue}
        return lambda: dispatch.linears_from_float(x, hadamard, [(int8, bias)], 8, False, **around)

    def eager(stages: InputStages) -> Callable[[], object]:
        return lambda: dispatch.quantize_activation(x, stages, 8, False, backend="torch")

    return [
        _seen("int8", lambda: from_float(x, NO_STAGES, int8, bias, 8, True)),
        _seen("int8, asymmetric input", lambda: from_float(x, NO_STAGES, int8, bias, 8, False)),
        _seen("int4, group scales", lambda: from_float(x, NO_STAGES, int4, bias, 8, True), 4),
        _seen("scale, Hadamard, int8", fused()),
        _seen("scale, rotation, gather, rotation, int8", lambda: from_float(x, rotations, int8, bias, 8, False)),
        _seen("GELU, scale, Hadamard, int8", fused(Prologue("gelu"))),
        _seen("norm, modulation, scale, Hadamard, int8", fused(norm)),
        _seen("scale, Hadamard, int8, gate, residual", fused(None, residual)),
        Case("int8 through torch", dispatch.kernel_name(8, 8, "torch"), _torch_call(x, int8, bias)),
        _seen("product alone, int8", lambda: dispatch.linear(levels, int8, bias)),
        _seen("product alone, int4", lambda: dispatch.linear(levels, int4, bias), 4),
        _seen("quantize alone", lambda: dispatch.quantize_activation(x, NO_STAGES, 8, False)),
        _seen("scale, Hadamard, quantize alone", lambda: dispatch.quantize_activation(x, hadamard, 8, False)),
        _seen(
            "scale, rotation, gather, rotation, quantize alone",
            lambda: dispatch.quantize_activation(x, rotations, 8, False),
        ),
        Case("eager torch: scale, Hadamard, quantize", "torch", eager(hadamard)),
        Case("eager torch: scale, rotation, gather, rotation, quantize", "torch", eager(rotations)),
    ]


def _seen(name: str, call: Callable[[], object], bits: int = 8) -> Case:
    """A case whose work is that of the kernel calls it is seen to make; without the C++ library it has none."""
    found: list[Work] = []
    with observed(lambda kernel: found.append(kernel.work)):
        call()
    sums = [sum(work[part] for work in found) for part in range(1, len(Work._fields))]
    kernel = dispatch.kernel_name(bits, 8, dispatch.select_backend(torch.device("cpu")))
    return Case(name, kernel, call, Work(name, *sums) if found else None)


def _pack_int8(weight: Tensor) -> PackedWeight:
    scale = weight.abs().amax(dim=1) / 127
    return dispatch.pack_weight((weight / scale[:, None]).round().to(torch.int8), scale, None, None, 8)


def _pack_int4(weight: Tensor) -> PackedWeight:
    groups = weight.unflatten(1, (-1, GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]))
    wanted = groups.abs().amax(dim=2) / 7
    scale = wanted.amax(dim=1) / 16
    group_scale = (wanted / scale[:, None]).round().clamp(1, 16)
    q = (groups / (group_scale * scale[:, None])[:, :, None]).round().clamp(-7, 7).flatten(1)
    return dispatch.pack_weight(q.to(torch.int8), scale, None, group_scale.to(torch.int8), 4)


def _two_rotations(width: int) -> InputStages:
    rotations = [torch.linalg.qr(torch.randn(BLOCK, BLOCK)).Q.contiguous() for _ in range(2)]
    order = torch.randperm(width).to(torch.int32)
    return InputStages(torch.rand(width) + 0.5, rotations[0], order, 0, rotations[1])


def _prepacked_call(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    if not torch.backends.mkldnn.is_available():
        return lambda: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _torch_call(x: Tensor, weight: PackedWeight, bias: Tensor) -> Callable[[], object]:
    return lambda: dispatch.linear_from_float(x, NO_STAGES, weight, bias, 8, True, backend="torch")
