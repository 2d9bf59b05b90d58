"""A few milliseconds of comparison between a freshly loaded library and the reference, before anybody relies on it."""

from __future__ import annotations

import ctypes

import torch

from trdq_core.kernels import calls, reference
from trdq_core.kernels.surroundings import apply_prologue, attend
from trdq_core.kernels.types import NO_STAGES, InputStages, Prologue, StaticGrid

TOKENS, IN_FEATURES, OUT_FEATURES = 7, 128, 70
TOLERANCE = 1e-4


def failure(library: ctypes.CDLL) -> str | None:
    """One sentence naming the first kernel that disagrees with the reference, or None."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN_FEATURES, generator=generator)
    for stages in (NO_STAGES, _all_stages(generator)):
        if not torch.allclose(calls.transform_rows(library, x, stages), reference.transform(x, stages), atol=TOLERANCE):
            return _sentence("transform")
        for symmetric, static, clip in (
            (True, None, 0.9),
            (False, None, 1.0),
            (False, StaticGrid(torch.tensor(0.02), torch.tensor(120.0)), 1.0),
        ):
            ours = calls.quantize_rows(library, x, stages, 8, symmetric, static, clip)
            theirs = reference.quantize_activation(x, stages, 8, symmetric, static, clip)
            if int((ours.values.int() - theirs.values.int()).abs().max()) > 1:
                return _sentence("quantization")
    return _fused_failure(library, x, generator) or _product_failure(library, x, generator)


def _fused_failure(library: ctypes.CDLL, x: torch.Tensor, generator: torch.Generator) -> str | None:
    shift, scale = torch.randn(2, 1, IN_FEATURES, generator=generator).unbind()
    for prologue in (Prologue("gelu"), Prologue("norm", shift, scale, 1e-6)):
        ours, theirs = calls.transform_rows(library, x, NO_STAGES, prologue), apply_prologue(x, prologue)
        if not torch.allclose(ours, theirs, atol=TOLERANCE):
            return _sentence(prologue.kind)
    q = x[None]
    if not torch.allclose(calls.attend(library, q, q, q, 2), attend(q, q, q, 2), atol=TOLERANCE):
        return _sentence("attention")
    return None


def _product_failure(library: ctypes.CDLL, x: torch.Tensor, generator: torch.Generator) -> str | None:
    activation = reference.quantize_activation(x, NO_STAGES, 8, False)
    scale = torch.rand(OUT_FEATURES, generator=generator) + 0.5
    zero_point = torch.randint(-8, 8, (OUT_FEATURES,), generator=generator).float()
    group_scale = torch.randint(1, 17, (OUT_FEATURES, 2), generator=generator).to(torch.int8)
    for bits, groups in ((8, None), (4, None), (4, group_scale)):
        limit = 2 ** (bits - 1)
        q = torch.randint(-limit, limit, (OUT_FEATURES, IN_FEATURES), generator=generator).to(torch.int8)
        weight = reference.pack_weight(q, scale, zero_point, groups, bits)
        ours, theirs = (
            calls.product(library, activation, weight, scale),
            reference.linear(activation, weight, scale),
        )
        if not torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().max())):
            return _sentence(f"{bits}-bit product")
    return None


def _all_stages(generator: torch.Generator) -> InputStages:
    return InputStages(
        inverse_scale=torch.rand(IN_FEATURES, generator=generator) + 0.5,
        rotation=torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q.contiguous(),
        permutation=torch.randperm(IN_FEATURES, generator=generator).to(torch.int32),
        hadamard_block=64,
        second_rotation=torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q.contiguous(),
    )


def _sentence(kernel: str) -> str:
    return f"The compiled {kernel} disagrees with the reference on this machine, so the C++ kernels are not used."
