"""The one quantized linear layer. Methods and models differ in its data, never in its class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trdq_core.kernels import dispatch
from trdq_core.kernels.types import PackedWeight, QuantizedActivation
from trdq_core.nn.buffers import keep_dtypes
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.weights.rounding import QuantizedWeight

_STACKED = ("qweight", "weight_scale", "weight_zero_point", "column_sum", "group_scale")


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Integer weights in the layout that the matrix products read; 6-bit weights are stored as int8."""
    return dispatch.pack_weight(
        weight.values,
        weight.scale,
        zero_point=weight.zero_point,
        group_scale=weight.group_scale,
        bits=4 if weight.bits == 4 else 8,
    )


class QuantizedLinear(nn.Module):
    """y = Q_A(T(x)) Q_W(T*(W))^T + bias with integer weights and activations.

    Buffers hold one slice a resident set: (sets, ...); the present time group picks the slice. `input_quantizer` is a child of
    the first linear that reads a tensor; its siblings only refer to it, so that nothing is stored twice.
    """

    def __init__(
        self,
        packed: Sequence[PackedWeight],
        bias: Tensor | None,
        input_quantizer: InputQuantizer,
        *,
        owns_input: bool,
        weight_bits: int,
    ) -> None:
        super().__init__()
        first = packed[0]
        self.in_features, self.out_features = first.in_features, first.out_features
        self.storage_bits, self.group_size, self.sets = first.bits, first.group_size, len(packed)
        self.weight_bits = weight_bits
        fields = dict(zip(_STACKED, ("data", "scale", "zero_point", "column_sum", "group_scale"), strict=True))
        for name, field in fields.items():
            parts = [getattr(weight, field) for weight in packed]
            self.register_buffer(name, None if parts[0] is None else torch.stack(parts))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        if owns_input:
            self.input_quantizer = input_quantizer
        else:
            object.__setattr__(self, "input_quantizer", input_quantizer)
        self._packed: list[PackedWeight] | None = None

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """x (..., in_features) to (..., out_features) in x's dtype."""
        quantizer = self.input_quantizer
        if quantizer.readers == 1:  # nobody else needs the integers: one call into the kernels instead of two
            return quantizer.linear(x, self.packed_weight(), self.bias)
        return self.product(quantizer(x), x)

    def product(self, activation: QuantizedActivation, x: Tensor) -> Tensor:
        """The output for an input that is quantized already: (..., out_features) with the leading sizes and dtype of x."""
        y = dispatch.linear(activation, self.packed_weight(), self.bias, backend=self.input_quantizer.backend)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def packed_weight(self) -> PackedWeight:
        """The weight of the present time group."""
        if self._packed is None:
            self._packed = [self._slice(i) for i in range(self.sets)]
        return self._packed[self.input_quantizer.time.group if self.sets > 1 else 0]

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs this layer."""
        quantizer = self.input_quantizer
        return dispatch.kernel_name(
            self.storage_bits, quantizer.bits, quantizer.backend, self.qweight.device.type, **self._sizes()
        )

    @property
    def simulated(self) -> bool:
        """Whether the product runs in floating point here: right results, but no time of a real kernel."""
        return dispatch.is_simulated(self.input_quantizer.backend, self.qweight.device.type, **self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {"in_features": self.in_features, "group_size": self.group_size}

    def refresh(self) -> None:
        """Forget what was derived from the buffers; call it after they were replaced."""
        self._packed = None

    def _slice(self, index: int) -> PackedWeight:
        parts = [None if part is None else part[index] for part in (getattr(self, name) for name in _STACKED)]
        data, scale, zero_point, column_sum, group_scale = parts
        return PackedWeight(
            data=data,
            scale=scale,
            zero_point=zero_point,
            column_sum=column_sum,
            group_scale=group_scale,
            bits=self.storage_bits,
            group_size=self.group_size,
            in_features=self.in_features,
            out_features=self.out_features,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self.refresh()
        return keep_dtypes(self, fn)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}, sets={self.sets}, kernel={self.kernel}"
