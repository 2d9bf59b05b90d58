"""The one quantized linear layer. Methods and models differ in its data, never in its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trdq_core.kernels import dispatch
from trdq_core.kernels.types import PackedWeight
from trdq_core.nn.buffers import check_in_memory, keep_dtypes
from trdq_core.nn.input_quantizer import InputQuantizer, QuantizedInput
from trdq_core.nn.stored_weights import (
    CODED_FIELDS,
    PACKED_FIELDS,
    coded_buffers,
    dense_weight,
    in_layout,
    pack,
    packed_buffers,
    shape_only,
    storage_bits,
)
from trdq_core.weights.rounding import QuantizedWeight, Weight, packed_bytes


class QuantizedLinear(nn.Module):
    """y = Q_A(T(x)) Q_W(T*(W) - L)^T + T(x) L^T + bias, the low-rank part L being optional.

    With integer grids on both sides it holds packed weights and runs integer kernels. Else it holds bit-packed codes and
    multiplies in floating point: right results, labelled `simulated`. Buffers hold one slice a resident set: (sets, ...);
    the present time group picks the slice. `input_quantizer` is a child of the first linear that reads a tensor; its
    siblings only refer to it, so that nothing is stored twice. `low_rank_up` is (out, rank) for each set.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        bias: Tensor | None,
        input_quantizer: InputQuantizer,
        *,
        owns_input: bool,
        low_rank_up: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        first = weights[0]
        self.integer = not input_quantizer.simulated and isinstance(first, QuantizedWeight)
        self.weight_bits, self.sets = first.bits, len(weights)
        self.out_features, self.in_features = (
            first.values if isinstance(first, QuantizedWeight) else first.codes
        ).shape
        self.group_size = first.group_size
        self.storage_bits = storage_bits(first.bits) if self.integer else first.bits
        self.file_bytes = sum(packed_bytes(weight) for weight in weights)
        names = list(PACKED_FIELDS) if self.integer else ["codes", *CODED_FIELDS]
        backend = input_quantizer.backend
        buffers = packed_buffers([pack(w, backend) for w in weights]) if self.integer else coded_buffers(weights)
        for name in names:
            self.register_buffer(name, buffers.get(name))
        self._like = None if self.integer else shape_only(first)
        up = torch.stack([part.half() for part in low_rank_up]) if low_rank_up else None
        self.register_buffer("low_rank_up", up)
        self.file_bytes += 0 if up is None else up.nbytes
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        if owns_input:
            self.input_quantizer = input_quantizer
        else:
            object.__setattr__(self, "input_quantizer", input_quantizer)
        self._packed: list[PackedWeight] | None = None
        self._dense: dict[int, Tensor] = {}

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """x (..., in_features) to (..., out_features) in x's dtype."""
        quantizer = self.input_quantizer
        if not self.integer or quantizer.readers > 1:
            return self.product(quantizer(x), x)
        # Nobody else needs the integers: one call into the kernels instead of two.
        return self._with_low_rank(*quantizer(x, self.packed_weight(), self.bias))

    def product(self, seen: QuantizedInput, x: Tensor) -> Tensor:
        """The output for an input that is quantized already: (..., out_features) with the leading sizes and dtype of x."""
        if self.integer:
            dtype = x.dtype if seen.low_rank is None else torch.float32
            backend = self.input_quantizer.backend
            y = dispatch.linear(seen.values, self.packed_weight(), self.bias, backend=backend, dtype=dtype)
        else:
            y = functional.linear(seen.values, self.dense_weight(), self.bias)
        return self._with_low_rank(y.view(*x.shape[:-1], self.out_features), seen.low_rank).to(x.dtype)

    def _with_low_rank(self, y: Tensor, low_rank: Tensor | None) -> Tensor:
        if low_rank is None or self.low_rank_up is None:
            return y
        return y + functional.linear(low_rank, self.low_rank_up[self._index()].float()).view(y.shape)

    def _index(self) -> int:
        return self.input_quantizer.time.group if self.sets > 1 else 0

    def packed_weight(self) -> PackedWeight:
        """The weight of the present time group, as the integer kernels read it."""
        if torch.compiler.is_compiling():  # nothing that a graph made is kept outside of it
            return self._slice(self._index())
        if self._packed is None:
            self._packed = [self._slice(i) for i in range(self.sets)]
        return self._packed[self._index()]

    def dense_weight(self) -> Tensor:
        """The weight (out, in) fp32 of the present time group, of a layer that multiplies in floating point."""
        index = self._index()
        if index in self._dense:
            return self._dense[index]
        buffers = {name: getattr(self, name) for name in ("codes", *CODED_FIELDS)}
        assert self._like is not None  # only layers without integer kernels come here
        check_in_memory(self.codes)
        dense = dense_weight(buffers, index, self._like)
        if not torch.compiler.is_compiling():
            self._dense[index] = dense
        return dense

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs this layer."""
        quantizer = self.input_quantizer
        if not self.integer:
            return f"simulated float32 (W{self.weight_bits}A{quantizer.bits})"
        return dispatch.kernel_name(
            self.storage_bits, quantizer.bits, quantizer.backend, self.qweight.device.type, **self._sizes()
        )

    @property
    def simulated(self) -> bool:
        """Whether the product runs in floating point here: right results, but no time of a real kernel."""
        if not self.integer:
            return True
        return dispatch.is_simulated(self.input_quantizer.backend, self.qweight.device.type, **self._sizes())

    @property
    def dense_bytes(self) -> int:
        """Memory of the floating-point copies that a simulated layer multiplies with, beside its codes."""
        return sum(dense.nbytes for dense in self._dense.values())

    def _sizes(self) -> dict[str, int]:
        return {"in_features": self.in_features, "group_size": self.group_size}

    def refresh(self) -> None:
        """Forget what was derived from the buffers; call it after they were replaced or changed."""
        self._packed, self._dense = None, {}

    def prepare(self, buffers: Mapping[str, Tensor]) -> PackedWeight | None:
        """What `take` wants beside the buffers of one set; touches nothing of the layer, so a thread may make it."""
        return self._slice(0, {**self._buffers, **buffers}) if self.integer else None

    def take(self, buffers: Mapping[str, Tensor], prepared: PackedWeight | None) -> None:
        """Put the buffers of another set in the place of the present one's."""
        self._buffers.update(buffers)
        self.refresh()
        self._packed = None if prepared is None else [prepared]

    def _slice(self, index: int, buffers: Mapping[str, Tensor | None] | None = None) -> PackedWeight:
        buffers = self._buffers if buffers is None else buffers
        check_in_memory(buffers["qweight"])
        parts = {field: buffers[name] for name, field in PACKED_FIELDS.items()}
        return PackedWeight(
            **{field: None if part is None else part[index] for field, part in parts.items()},
            bits=self.storage_bits,
            group_size=self.group_size,
            in_features=self.in_features,
            out_features=self.out_features,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self.refresh()
        moved = keep_dtypes(self, fn)
        self.fit_backend()
        return moved

    def fit_backend(self) -> None:
        """Let the input go through kernels of the device that the weight is on, and lay the weight out for them."""
        self.input_quantizer.fit_backend((self.qweight if self.integer else self.codes).device)
        if self.integer and not self.qweight.is_meta:
            self.qweight = self.laid_out(self.qweight)
            self.refresh()

    def laid_out(self, qweight: Tensor, *, panels: bool = False) -> Tensor:
        """A `qweight` (sets, ...) of this layer in the layout that its backend multiplies with, or in panels, as files have
        it; the tensor itself where it lies so.
        """
        rows = self.input_quantizer.backend == "triton" and not panels
        return in_layout(qweight, self.storage_bits, self.in_features, self.out_features, rows=rows)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}, sets={self.sets}, kernel={self.kernel}"
