"""What is fused around the quantized linear, against float64: GELU, norm and modulation before it, gate and residual after."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import generator, make_input, make_stages, make_weight
from tests.kernels.test_quantize import assert_near_levels
from trdq_core.errors import ShapeError
from trdq_core.kernels import dispatch, reference
from trdq_core.kernels.surroundings import apply_epilogue, apply_prologue
from trdq_core.kernels.types import NO_STAGES, Epilogue, InputStages, Prologue

SHAPES = [(1, 1, 1), (2, 3, 33), (1, 7, 100), (3, 1, 64), (2, 13, 384)]  # items, tokens of an item, channels
KINDS = ["gelu", "norm"]


def make_prologue(kind: str, items: int, width: int) -> Prologue:
    """A prologue of the kind, its shift and scale of ordinary size."""
    if kind == "gelu":
        return Prologue("gelu")
    shift, scale = torch.randn(2, items, width, generator=generator(5)).unbind()
    return Prologue("norm", shift, scale, 1e-6)


def oracle(x: Tensor, prologue: Prologue, stages: InputStages) -> Tensor:
    """T(prologue(x)) in float64."""
    return reference.transform(apply_prologue(x.double(), prologue), stages)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_prologue_matches_float64(
    native_backend: ModuleType, threads: int, kind: str, shape: tuple[int, int, int]
) -> None:
    """One token, one channel, widths that no register divides, several items, one or two threads."""
    items, tokens, width = shape
    x, prologue = make_input(items * tokens, width), make_prologue(kind, items, width)
    expected = oracle(x, prologue, NO_STAGES)
    actual = native_backend.transform(x, NO_STAGES, prologue).double()
    if kind == "norm" and width == 1:  # the variance is 0: what is left is the shift
        torch.testing.assert_close(actual, prologue.shift.double().repeat_interleave(tokens, 0))
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=4e-6 * float(expected.abs().max() + 1e-3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [{"hadamard": 128}, {"scale": True, "rotation": 64, "permute": True, "second": 32}])
def test_levels_behind_a_prologue(native_backend: ModuleType, kind: str, parts: dict[str, int]) -> None:
    """Levels, scales and zero points are those of the reference but for rounding ties."""
    x, stages, prologue = make_input(26, 384), make_stages(384, **parts), make_prologue(kind, 2, 384)
    for symmetric in (True, False):
        ours = native_backend.quantize_activation(x, stages, 8, symmetric, prologue=prologue)
        theirs = reference.quantize_activation(apply_prologue(x.double(), prologue).float(), stages, 8, symmetric)
        assert_near_levels(ours, theirs)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("kind", KINDS)
def test_prologue_of_zero_tiny_and_huge_rows(native_backend: ModuleType, kind: str, size: float) -> None:
    """Nothing overflows on the way where the result itself does not."""
    x, prologue = torch.randn(6, 48, generator=generator()) * size, make_prologue(kind, 2, 48)
    x[1] = 0
    if kind == "norm" and size == 1e15:
        x *= 1e-2  # squares have to fit float32
    actual = native_backend.transform(x, NO_STAGES, prologue)
    assert bool(torch.isfinite(actual).all())
    expected = oracle(x, prologue, NO_STAGES)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


def test_prologue_and_gate_of_slices(native_backend: ModuleType) -> None:
    """Shift, scale and gate as a model has them: slices of one wider tensor; and an input that is not contiguous."""
    wide = torch.randn(2, 3 * 64, generator=generator())
    shift, scale, gate = wide.chunk(3, 1)
    x = torch.randn(64, 10, generator=generator(1)).t()
    weight, added = make_weight(64, 64, 8), torch.randn(10, 64, generator=generator(2))
    sliced = native_backend.linear_from_float(
        x,
        NO_STAGES,
        weight,
        None,
        8,
        True,
        prologue=Prologue("norm", shift, scale, 1e-6),
        epilogue=Epilogue(added, gate),
    )
    whole = native_backend.linear_from_float(
        x.contiguous(), NO_STAGES, weight, None, 8, True,
        prologue=Prologue("norm", shift.contiguous(), scale.contiguous(), 1e-6), epilogue=Epilogue(added, gate.contiguous()),
    )  # fmt: skip
    assert torch.equal(sliced, whole)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "out_features"), [(1, 1), (9, 70), (26, 64), (300, 130)])
def test_residual_and_gate(
    native_backend: ModuleType, threads: int, tokens: int, out_features: int, gated: bool
) -> None:
    """added + gate * (product + bias), for tiles that are full and that are not."""
    items = 2 if tokens % 2 == 0 else 1
    weight, bias = make_weight(out_features, 100, 8, zero_point=True), torch.randn(out_features, generator=generator())
    added = torch.randn(tokens, out_features, generator=generator(1))
    gate = torch.randn(items, out_features, generator=generator(2)) if gated else None
    x = make_input(tokens, 100)
    levels = reference.quantize_activation(x, NO_STAGES, 8, False)
    expected = apply_epilogue(reference.linear(levels, weight, bias).double(), Epilogue(added, gate))
    actual = native_backend.linear_from_float(
        x, NO_STAGES, weight, bias, 8, False, epilogue=Epilogue(added, gate)
    ).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [8, 4])
def test_several_weights_of_one_input(native_backend: ModuleType, threads: int, bits: int) -> None:
    """Side by side, and bit-equal to one after the other."""
    x, stages = make_input(50, 128), make_stages(128, scale=True, hadamard=64)
    weights = [
        (make_weight(width, 128, bits, seed=width), torch.randn(width, generator=generator())) for width in (70, 1, 64)
    ]
    together = native_backend.linears_from_float(x, stages, weights, 8, True)
    alone = [native_backend.linear_from_float(x, stages, weight, bias, 8, True) for weight, bias in weights]
    assert torch.equal(together, torch.cat(alone, 1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [6, 26, 300])
def test_residual_and_gate_of_several_weights(
    native_backend: ModuleType, threads: int, tokens: int, gated: bool
) -> None:
    """Every product takes its own columns of what is added and of the gate."""
    widths = (70, 1, 64)
    weights = [(make_weight(width, 64, 8, seed=width), torch.randn(width, generator=generator())) for width in widths]
    added = torch.randn(tokens, sum(widths), generator=generator(1))
    gate = torch.randn(2, sum(widths), generator=generator(2)) if gated else None
    x = make_input(tokens, 64)
    levels = reference.quantize_activation(x, NO_STAGES, 8, True)
    products = torch.cat([reference.linear(levels, weight, bias) for weight, bias in weights], 1)
    expected = apply_epilogue(products.double(), Epilogue(added, gate))
    actual = native_backend.linears_from_float(x, NO_STAGES, weights, 8, True, epilogue=Epilogue(added, gate)).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["torch", "cpp", "reference"])
def test_every_backend_takes_prologue_and_epilogue(name: dispatch.Backend, cpp: ModuleType) -> None:
    """Through the dispatch, with leading dimensions; all near the float product."""
    x, prologue = torch.randn(2, 5, 64, generator=generator()), make_prologue("norm", 2, 64)
    added, gate = torch.randn(10, 70, generator=generator(3)), torch.randn(2, 70, generator=generator(4))
    weight = make_weight(70, 64, 8)
    y = dispatch.linears_from_float(
        x, NO_STAGES, [(weight, None)], 8, True, prologue=prologue, epilogue=Epilogue(added, gate), backend=name
    )
    dense = reference.unpack_weight(weight).double() * weight.scale.double()[:, None]
    exact = apply_epilogue(oracle(x.flatten(0, 1), prologue, NO_STAGES) @ dense.T, Epilogue(added, gate))
    assert y.shape == (2, 5, 70)
    assert float((y.flatten(0, 1).double() - exact).norm() / exact.norm()) < 0.02


def test_sizes_without_panels_run_through_torch(cpp: ModuleType) -> None:
    """A group size that the panels do not take: prologue, several weights and epilogue all the same."""
    weight = make_weight(10, 60, 4, groups=5)
    x, prologue = make_input(6, 60), make_prologue("gelu", 1, 60)
    added = torch.randn(6, 20, generator=generator(1))
    y = cpp.linears_from_float(x, NO_STAGES, [(weight, None)] * 2, 8, True, None, 1.0, prologue, Epilogue(added))
    levels = reference.quantize_activation(apply_prologue(x, prologue), NO_STAGES, 8, True)
    product = reference.linear(levels, weight)
    expected = added + torch.cat([product, product], 1)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_misfits_are_named(cpp: ModuleType) -> None:
    """Numbers of items that do not divide the tokens, and residuals of another shape."""
    x, weight = make_input(5, 64), make_weight(8, 64, 8)
    two = torch.zeros(2, 64)
    with pytest.raises(ShapeError, match="divides the tokens"):
        cpp.transform(x, NO_STAGES, Prologue("norm", two, two, 1e-6))
    for shift, scale in ((torch.zeros(5, 64), two[:1]), (two[:1], torch.zeros(5, 64))):  # each goes with the tokens
        with pytest.raises(ShapeError, match=r"shift \(\d, 64\) and scale \(\d, 64\)"):
            cpp.transform(x, NO_STAGES, Prologue("norm", shift, scale, 1e-6))
    with pytest.raises(ShapeError, match="scale is nothing"):
        cpp.transform(x, NO_STAGES, Prologue("norm", two[:1], None, 1e-6))
    with pytest.raises(ShapeError, match="cannot be added"):
        cpp.linear_from_float(x, NO_STAGES, weight, None, 8, True, epilogue=Epilogue(torch.zeros(5, 9)))
    with pytest.raises(ShapeError, match="gate of shape"):
        cpp.linear_from_float(x, NO_STAGES, weight, None, 8, True, epilogue=Epilogue(torch.zeros(5, 8), two[:, :8]))


def test_compiled_graphs_take_a_prologue(cpp: ModuleType) -> None:
    """torch.compile sees torch's own GELU and the integer operator, in one graph."""
    x, weight = make_input(5, 64), make_weight(70, 64, 8)
    added = torch.ones(5, 70)

    def layer(rows: Tensor) -> Tensor:
        return cpp.linear_from_float(
            rows, NO_STAGES, weight, None, 8, True, prologue=Prologue("gelu"), epilogue=Epilogue(added)
        )

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-2, atol=1e-2 * float(layer(x).abs().max()))
