"""A comparison of the Triton kernels with the reference on a GPU, once a process, before anybody relies on them.

It also finds out what only a launch shows: no C compiler for Triton's launcher, a driver that is too old.
"""

from __future__ import annotations

import torch

from trdq_core.kernels import reference, triton_gpu
from trdq_core.kernels.packing import pack_weight, to_rows
from trdq_core.kernels.surroundings import apply_epilogue, apply_prologue
from trdq_core.kernels.types import Epilogue, InputStages, PackedWeight, Prologue, QuantizedActivation

TOKENS, IN_FEATURES, OUT_FEATURES = 7, 256, 70
TOLERANCE = 1e-4
FUSED_TOLERANCE = 2e-3  # a level at a rounding tie may differ

_reasons: dict[torch.device, str | None] = {}


def unavailable_reason(device: torch.device) -> str | None:
    """One sentence saying why the Triton kernels cannot run on `device`, or None where they can and were found right."""
    reason = triton_gpu.unavailable_reason(device)
    if reason is not None or device.type == "cpu":  # the interpreter needs no such test
        return reason
    if device not in _reasons:
        _reasons[device] = failure(device)
    return _reasons[device]


def failure(device: torch.device) -> str | None:
    """One sentence about the first kernel that disagrees with the reference on `device` or does not run, or None."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN_FEATURES, generator=generator)
    stages = InputStages(
        inverse_scale=torch.rand(IN_FEATURES, generator=generator) + 0.5,
        permutation=torch.randperm(IN_FEATURES, generator=generator).to(torch.int32),
        hadamard_block=128,
        second_rotation=torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q.contiguous(),
    )
    on_device = InputStages(*(_on(device, part) for part in stages))
    try:
        ours = triton_gpu.quantize_activation(x.to(device), on_device, 8, False)
        if not _same_levels(ours, reference.quantize_activation(x, stages, 8, False)):
            return _sentence("quantization")
        for weight in _weights(generator):
            y = triton_gpu.linear(ours, _moved(weight, device))
            if not _close(y.cpu(), reference.linear(QuantizedActivation(*(part.cpu() for part in ours)), weight)):
                return _sentence(f"{weight.bits}-bit product")
        for prologue in _prologues(generator):
            if not _fused_alike(prologue, x, stages, on_device, _weights(generator), generator):
                return _sentence(f"{prologue.kind} with gate and residual")
    except Exception as error:  # whatever Triton raises, torch's own calls can stand in
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"The Triton kernels do not start on this machine ({type(error).__name__}: {first[:200]})."
    return None


def _same_levels(ours: QuantizedActivation, theirs: QuantizedActivation) -> bool:
    own = ours.values.cpu().float() - ours.zero_point.cpu()[:, None]
    return bool((own - (theirs.values.float() - theirs.zero_point[:, None])).abs().max() <= 1)


def _prologues(generator: torch.Generator) -> list[Prologue]:
    return [Prologue("gelu"), Prologue("norm", *torch.randn(2, 1, IN_FEATURES, generator=generator), 1e-6)]


def _fused_alike(
    prologue: Prologue,
    x: torch.Tensor,
    stages: InputStages,
    on_device: InputStages,
    weights: list[PackedWeight],
    generator: torch.Generator,
) -> bool:
    """Whether products side by side, with what is fused around them, are those of the reference."""
    device = on_device.permutation.device
    outputs = OUT_FEATURES * len(weights)
    around = Epilogue(torch.randn(TOKENS, outputs, generator=generator), torch.rand(1, outputs, generator=generator))
    levels = reference.quantize_activation(apply_prologue(x.double(), prologue), stages, 8, False)
    theirs = apply_epilogue(torch.cat([reference.linear(levels, weight) for weight in weights], 1), around)
    first, last = (type(part)(*(_on(device, one) for one in part)) for part in (prologue, around))
    pairs = [(_moved(weight, device), None) for weight in weights]
    ours = triton_gpu.linears_from_float(x.to(device), on_device, pairs, 8, False, prologue=first, epilogue=last).cpu()
    return float((ours - theirs).norm()) < FUSED_TOLERANCE * float(theirs.norm())


def _on(device: torch.device, part: object) -> object:
    return part.to(device) if isinstance(part, torch.Tensor) else part


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().max()))


def _weights(generator: torch.Generator) -> list[PackedWeight]:
    scale = torch.rand(OUT_FEATURES, generator=generator) + 0.5
    zero_point = torch.randint(-8, 8, (OUT_FEATURES,), generator=generator).float()
    groups = torch.randint(1, 17, (OUT_FEATURES, 2), generator=generator).to(torch.int8)
    found = []
    for bits, group_scale in ((8, None), (4, groups)):
        limit = 2 ** (bits - 1)
        q = torch.randint(-limit, limit, (OUT_FEATURES, IN_FEATURES), generator=generator).to(torch.int8)
        found.append(pack_weight(q, scale, zero_point, group_scale, bits))
    return found


def _moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
    return PackedWeight(*(_on(device, part) for part in to_rows(weight)))


def _sentence(kernel: str) -> str:
    return f"The Triton {kernel} disagrees with the reference on this GPU, so the Triton kernels are not used."
