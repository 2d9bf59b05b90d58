"""Large unquantized linears with a few rows, such as those of the timestep: what they cost is reading the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trdq_core.nn.fused import fusion_is_off, hooked

FEW = 8
LARGE = 1 << 19  # elements of a weight; a smaller one is read in less time than it takes to wake a second thread


class FewRows:
    """Stands in for `forward` of a float32 linear on the CPU.

    For a few rows, weight times input reads the weight once at the speed of memory; torch's input times weight takes two to
    three times as long there.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.plain = linear, linear.forward

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        linear = self.linear
        weight, rows = linear.weight, x.numel() // max(linear.in_features, 1)
        plain = rows > FEW or x.dtype is not torch.float32 or weight.dtype is not x.dtype or x.device.type != "cpu"
        if plain or x.shape[-1] != linear.in_features or fusion_is_off() or hooked(linear):
            return self.plain(x)
        y = (weight @ x.reshape(rows, linear.in_features).t()).t()
        y = y if linear.bias is None else y + linear.bias
        return y.reshape(*x.shape[:-1], linear.out_features)


def read_weights_once(denoiser: nn.Module) -> None:
    """Let the large linears that stay in full precision be quick for few rows."""
    for module in denoiser.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LARGE and not isinstance(module.forward, FewRows):
            module.forward = FewRows(module)
