"""What the Triton kernels do around a quantized linear, against float64: through the dispatch, as blocks call it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import generator, make_input, make_stages, make_weight
from tests.kernels.test_fused import make_prologue
from tests.kernels.triton_device import DEVICE, moved
from trdq_core.errors import ShapeError
from trdq_core.kernels import dispatch, reference, triton_launch, triton_operators
from trdq_core.kernels.packing import to_rows
from trdq_core.kernels.surroundings import apply_epilogue, apply_prologue
from trdq_core.kernels.types import NO_STAGES, Epilogue, InputStages, PackedWeight, Prologue

pytestmark = pytest.mark.usefixtures("triton")

Weights = list[tuple[PackedWeight, Tensor | None]]


def ours(
    x: Tensor, stages: InputStages, weights: Weights, prologue: Prologue | None, epilogue: Epilogue | None
) -> Tensor:
    """What the dispatch gives on the backend, from operands on the CPU."""
    there = [(moved(to_rows(weight)), None if bias is None else bias.to(DEVICE)) for weight, bias in weights]
    around = (None if part is None else moved(part) for part in (prologue, epilogue))
    keywords = dict(zip(("prologue", "epilogue"), around, strict=True))
    return dispatch.linears_from_float(
        x.to(DEVICE), moved(stages), there, 8, False, backend="triton", **keywords
    ).cpu()  # fmt: skip


def theirs(
    x: Tensor, stages: InputStages, weights: Weights, prologue: Prologue | None, epilogue: Epilogue | None
) -> Tensor:
    """The same in float64 around the reference's own levels and products."""
    rows = x.flatten(0, -2).double()
    rows = rows if prologue is None else apply_prologue(rows, prologue)
    levels = reference.quantize_activation(rows, stages, 8, False)
    y = torch.cat([reference.linear(levels, weight, bias) for weight, bias in weights], 1).double()
    return (y if epilogue is None else apply_epilogue(y, epilogue)).view(*x.shape[:-1], -1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    """A rounding tie may move a few levels by one; half types round once more."""
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).norm() / expected.norm()) < tolerance


def make_epilogue(tokens: int, width: int, items: int, dtype: torch.dtype = torch.float32) -> Epilogue:
    """A residual and a gate of ordinary size beside the products of `make_weight`."""
    added = torch.randn(tokens, width, generator=generator(3)) * 10
    gate = torch.randn(items, width, generator=generator(4))
    return Epilogue(added.to(dtype), gate.to(dtype))


@pytest.mark.parametrize("kind", ["gelu", "norm", None])
@pytest.mark.parametrize("bits", [8, 4])
def test_prologue_products_and_epilogue(kind: str | None, bits: int) -> None:
    """Three weights of one input, the middle one of one output: each product takes its own columns of gate and residual."""
    x = torch.randn(2, 5, 64, generator=generator()) * 2
    prologue = None if kind is None else make_prologue(kind, 2, 64)
    weights = [
        (make_weight(width, 64, bits, groups=2 if bits == 4 else 0, zero_point=True, seed=width), bias)
        for width, bias in ((70, torch.ones(70)), (1, None), (64, torch.ones(64)))
    ]
    epilogue, stages = make_epilogue(10, 135, 2), make_stages(64, scale=True, permute=True, hadamard=32)
    close(ours(x, stages, weights, prologue, epilogue), theirs(x, stages, weights, prologue, epilogue))


@pytest.mark.parametrize("kind", ["gelu", "norm"])
def test_a_prologue_before_two_rotations(kind: str) -> None:
    """Two passes: the first one takes the prologue, the second one quantizes."""
    x, prologue = torch.randn(6, 64, generator=generator()), make_prologue(kind, 3, 64)
    stages, weights = make_stages(64, rotation=32, permute=True, second=64), [(make_weight(40, 64, 8), None)]
    close(ours(x, stages, weights, prologue, None), theirs(x, stages, weights, prologue, None))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 65), (2, 70, 5)])  # items, tokens of an item, outputs
def test_residual_and_gate(shape: tuple[int, int, int], gated: bool) -> None:
    """One token, one token an item, more tokens than a tile has rows."""
    items, tokens, outputs = shape
    x, weights = make_input(items * tokens, 100), [(make_weight(outputs, 100, 8), torch.ones(outputs))]
    epilogue = make_epilogue(items * tokens, outputs, items)
    epilogue = epilogue if gated else epilogue._replace(gate=None)
    close(ours(x, NO_STAGES, weights, None, epilogue), theirs(x, NO_STAGES, weights, None, epilogue), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    """Input, modulation, residual and gate as a half-precision block has them, slices of one wider tensor; rounded once."""
    x = (torch.randn(2, 5, 64, generator=generator()) * 2).to(dtype)
    shift, scale, gate = torch.randn(2, 3, 64, generator=generator(5)).to(dtype).unbind(1)
    prologue, epilogue = Prologue("norm", shift, scale, 1e-6), Epilogue(x.flatten(0, 1), gate)
    weights = [(make_weight(64, 64, 8), torch.ones(64))]
    actual = ours(x, NO_STAGES, weights, prologue, epilogue)
    assert actual.dtype is dtype
    wide = Prologue("norm", shift.double(), scale.double(), 1e-6)
    expected = theirs(x, NO_STAGES, weights, wide, Epilogue(x.flatten(0, 1).double(), gate.double()))
    close(actual, expected, 4 * torch.finfo(dtype).eps)


def test_strides_of_the_residual() -> None:
    """A residual whose rows are apart, and a gate whose channels are."""
    x, weights = make_input(6, 64), [(make_weight(40, 64, 8), None)]
    epilogue = make_epilogue(6, 40, 2)
    added = torch.cat((epilogue.added, epilogue.added), 1)[:, :40]
    gate = epilogue.gate.t().contiguous().t()
    expected = ours(x, NO_STAGES, weights, None, epilogue)
    assert torch.equal(ours(x, NO_STAGES, weights, None, Epilogue(added, gate)), expected)


def test_nothing_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU, norm, gate and residual: one pass and one product, no call of torch's own."""
    passes: list[str] = []
    for name in ("quantize_rows", "product"):
        original = getattr(triton_launch, name)
        monkeypatch.setattr(triton_launch, name, lambda *a, _n=name, _f=original: (passes.append(_n), _f(*a))[1])
    for module in (dispatch, triton_operators):
        for name in ("apply_prologue", "apply_epilogue"):
            monkeypatch.setattr(module, name, None, raising=False)
    x, weights = torch.randn(2, 5, 64, generator=generator()), [(make_weight(64, 64, 8), None)]
    for kind in ("gelu", "norm"):
        ours(x, make_stages(64, hadamard=32), weights, make_prologue(kind, 2, 64), make_epilogue(10, 64, 2))
    assert passes == ["quantize_rows", "product"] * 2


def test_no_tokens() -> None:
    """Nothing in, nothing out, with everything around it."""
    x, prologue = torch.empty(0, 64), make_prologue("norm", 2, 64)
    assert ours(x, NO_STAGES, [(make_weight(40, 64, 8), None)], prologue, make_epilogue(0, 40, 2)).shape == (0, 40)


def test_misfits_are_named() -> None:
    """The sentences that every backend gives, before a kernel reads beyond a tensor."""
    x, weights = make_input(6, 64), [(make_weight(40, 64, 8), None)]
    two, one = torch.zeros(2, 64), torch.zeros(1, 64)
    with pytest.raises(ShapeError, match="divides the tokens"):
        ours(x, NO_STAGES, weights, Prologue("norm", two.repeat(2, 1), two.repeat(2, 1), 1e-6), None)
    with pytest.raises(ShapeError, match="give both for the same items"):
        ours(x, NO_STAGES, weights, Prologue("norm", two, one, 1e-6), None)
    with pytest.raises(ShapeError, match="cannot be added"):
        ours(x, NO_STAGES, weights, None, Epilogue(torch.zeros(6, 41)))
    with pytest.raises(ShapeError, match="gate of shape"):
        ours(x, NO_STAGES, weights, None, Epilogue(torch.zeros(6, 40), torch.zeros(4, 40)))


def test_one_graph_under_compile(triton: ModuleType) -> None:
    """The pass and the products are operators; joining them, gate and residual are torch's, for its compiler to fuse."""
    weights = [(moved(to_rows(make_weight(width, 64, 8))), None) for width in (40, 8)]
    prologue, epilogue = moved(make_prologue("norm", 2, 64)), moved(make_epilogue(6, 48, 2))

    def layer(x: Tensor) -> Tensor:
        return dispatch.linears_from_float(
            x, NO_STAGES, weights, 8, True, prologue=prologue, epilogue=epilogue, backend="triton"
        )

    x = make_input(6, 64).to(DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
