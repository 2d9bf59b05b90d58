"""Inputs, weights and stages that the kernel tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from trdq_core.kernels.packing import pack_weight
from trdq_core.kernels.types import InputStages, PackedWeight


def generator(seed: int = 0) -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(seed)


def make_input(tokens: int, width: int, seed: int = 0) -> Tensor:
    """(tokens, width) float32 with channels of very different size, as diffusion transformers have them."""
    source = generator(seed)
    return torch.randn(tokens, width, generator=source) * torch.rand(width, generator=source).mul(4).exp()


def make_weight(
    out_features: int,
    in_features: int,
    bits: int,
    *,
    groups: int = 0,
    zero_point: bool = False,
    seed: int = 0,
) -> PackedWeight:
    """A packed random weight that uses the whole range of its bits."""
    source, limit = generator(seed), 2 ** (bits - 1)
    q = torch.randint(-limit, limit, (out_features, in_features), generator=source).to(torch.int8)
    scale = torch.rand(out_features, generator=source) * 0.1 + 0.01
    zero = torch.randint(-limit, limit, (out_features,), generator=source).float() if zero_point else None
    scales = torch.randint(1, 17, (out_features, groups), generator=source).to(torch.int8) if groups else None
    return pack_weight(q, scale, zero, scales, bits)


def make_rotation(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, float32."""
    return (
        torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64)).Q.float().contiguous()
    )


def make_stages(
    width: int,
    *,
    scale: bool = False,
    rotation: int = 0,
    permute: bool = False,
    hadamard: int = 0,
    second: int = 0,
) -> InputStages:
    """Stages with the named parts present; rotation, hadamard and second are block sizes."""
    source = generator(width)
    return InputStages(
        inverse_scale=torch.rand(width, generator=source) + 0.5 if scale else None,
        rotation=make_rotation(rotation, 1) if rotation else None,
        permutation=torch.randperm(width, generator=source).to(torch.int32) if permute else None,
        hadamard_block=hadamard,
        second_rotation=make_rotation(second, 2) if second else None,
    )
