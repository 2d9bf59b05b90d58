"""Triton's quantization against the reference: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.cases import make_input, make_rotation, make_stages
from tests.kernels.test_quantize import assert_near_levels, assert_same_levels, strided
from tests.kernels.triton_device import DEVICE, moved, unsigned
from trdq_core.errors import ShapeError
from trdq_core.kernels import reference, triton_gpu
from trdq_core.kernels.types import NO_STAGES, InputStages, QuantizedActivation, StaticGrid

pytestmark = pytest.mark.usefixtures("triton")


def quantize(
    x: Tensor,
    stages: InputStages,
    bits: int,
    symmetric: bool,
    static: StaticGrid | None = None,
    clip: float = 1.0,
) -> QuantizedActivation:
    """What the Triton kernel gives, as the reference writes it: on the CPU, unsigned."""
    grid = None if static is None else moved(static)
    found = triton_gpu.quantize_activation(x.to(DEVICE), moved(stages), bits, symmetric, grid, clip)
    assert found.values.dtype is torch.int8
    return unsigned(found)


def transform(x: Tensor, stages: InputStages) -> Tensor:
    return triton_gpu.transform(x.to(DEVICE), moved(stages)).cpu()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (7, 33), (19, 100), (3, 1200)])
def test_levels_without_stages_are_bit_equal(shape: tuple[int, int], bits: int, symmetric: bool) -> None:
    """Odd sizes, one token, rows of several tiles: true division by the scale, rounding half to even."""
    x = make_input(*shape)
    assert_same_levels(
        quantize(x, NO_STAGES, bits, symmetric), reference.quantize_activation(x, NO_STAGES, bits, symmetric)
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clipped_range_and_ties(symmetric: bool) -> None:
    """A clip factor saturates alike; values between two levels end at the even one."""
    x = make_input(5, 70)
    expected = reference.quantize_activation(x, NO_STAGES, 4, symmetric, None, 0.7)
    assert_same_levels(quantize(x, NO_STAGES, 4, symmetric, None, 0.7), expected)
    ties = torch.cat((torch.arange(-127, 128).float() * 0.5, torch.tensor([127.0])))[None]
    expected = reference.quantize_activation(ties, NO_STAGES, 8, symmetric)
    assert_same_levels(quantize(ties, NO_STAGES, 8, symmetric), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_huge_tiny_and_zero_rows(symmetric: bool) -> None:
    """All-zero rows and rows at the ends of float32 keep a usable scale; so do one-sided rows."""
    factors = torch.tensor([0.0, 1e-30, 1e-13, 1e-6, 1e6, 1e30, 3e37])[:, None]
    x = torch.cat((make_input(7, 70).clamp(-5, 5) * factors, make_input(2, 70).abs() + 1, -make_input(2, 70).abs() - 1))
    actual = quantize(x, NO_STAGES, 8, symmetric)
    assert_same_levels(actual, reference.quantize_activation(x, NO_STAGES, 8, symmetric))
    assert bool((actual.scale > 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_grid(symmetric: bool) -> None:
    """A calibrated grid is used for every token; far values are clipped and do not wrap."""
    x = make_input(5, 130)
    x[0, 0], x[1, 1] = 1e30, -1e30
    grid = StaticGrid(torch.tensor([0.05]), torch.tensor([128.0 if symmetric else 6.0]))
    expected = reference.quantize_activation(x, NO_STAGES, 8, symmetric, grid)
    assert_same_levels(quantize(x, NO_STAGES, 8, symmetric, grid), expected)


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_hadamard_blocks(block: int) -> None:
    """Each block size has an error of float32 size, and applied twice gives the input back."""
    x, stages = make_input(3, 512), InputStages(hadamard_block=block)
    there = transform(x, stages)
    expected = reference.transform(x.double(), stages)
    torch.testing.assert_close(there.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    torch.testing.assert_close(transform(there, stages), x, rtol=1e-5, atol=1e-4)


PARTS = [
    {"scale": True},
    {"permute": True},
    {"scale": True, "permute": True, "hadamard": 64},
    {"rotation": 64},
    {"scale": True, "second": 32},
    {"scale": True, "rotation": 32, "permute": True, "second": 64},
    {"scale": True, "rotation": 64, "permute": True, "hadamard": 128, "second": 32},
    {"scale": True, "rotation": 256, "permute": True, "hadamard": 32},  # wider than a tile: torch's matmul
    {"hadamard": 32, "second": 256},
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts))
def test_stages(parts: dict[str, int], symmetric: bool) -> None:
    """In one pass or several: the transform as precise as float32, the levels equal but for rounding ties."""
    x, stages = make_input(5, 256), make_stages(256, **parts)
    if symmetric:
        expected = reference.transform(x.double(), stages)
        actual = transform(x, stages).double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert_near_levels(quantize(x, stages, 8, symmetric), reference.quantize_activation(x, stages, 8, symmetric))


@pytest.mark.parametrize(("width", "rotation"), [(96, 96), (60, 12), (21, 7), (48, 16)])
def test_rotations_of_any_size(width: int, rotation: int) -> None:
    """Blocks that are no power of two are padded inside the tile, and nothing of the padding shows."""
    x, stages = make_input(5, width), make_stages(width, rotation=rotation, permute=True, second=rotation)
    expected = reference.transform(x.double(), stages)
    actual = transform(x, stages).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_layouts_of_the_input() -> None:
    """Strides and leading dimensions do not change the result."""
    x, stages = make_input(6, 64), make_stages(64, scale=True, hadamard=64)
    expected = quantize(x, stages, 8, True)
    for view in (*strided(x), x.view(2, 3, 64)):
        assert_same_levels(quantize(view, stages, 8, True), expected)
    turned = make_rotation(32).T
    assert torch.equal(
        transform(x, InputStages(rotation=turned)), transform(x, InputStages(rotation=turned.contiguous()))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    """Half types go to float32 before anything else; the transform comes back in the input's type."""
    x = make_input(5, 64).to(dtype)
    expected = reference.quantize_activation(x.float(), NO_STAGES, 8, True)
    assert_same_levels(quantize(x, NO_STAGES, 8, True), expected)
    stages = make_stages(64, hadamard=64)
    actual = transform(x, stages)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), reference.transform(x.float(), stages), rtol=1e-2, atol=1e-3)


def test_no_tokens_and_no_channels_past_the_row() -> None:
    """Zero tokens give empty levels; a gather outside the row reads zeros, not foreign memory."""
    found = quantize(torch.empty(0, 64), make_stages(64, rotation=32, hadamard=32), 8, True)
    assert [part.shape for part in found] == [(0, 64), (0,), (0,), (0,)]
    wrong = torch.arange(64, dtype=torch.int32)
    wrong[7], wrong[9] = 64, -1
    there = transform(torch.ones(2, 64), InputStages(permutation=wrong))
    assert there[:, [7, 9]].abs().max() == 0
    assert float(there.sum()) == 2 * 62


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row(bad: float, symmetric: bool) -> None:
    """A row with NaN or infinity gives some levels; the others stay right."""
    x = make_input(4, 64)
    x[3, 5] = bad
    for stages in (NO_STAGES, make_stages(64, scale=True, permute=True, hadamard=64)):
        actual = quantize(x, stages, 8, symmetric)
        expected = reference.quantize_activation(x[:3], stages, 8, symmetric)
        assert_near_levels(QuantizedActivation(*(part[:3] for part in actual)), expected)


FUSED_STAGES = [
    {},
    {"scale": True, "permute": True, "hadamard": 64},
    {"scale": True, "rotation": 32, "permute": True, "second": 32},
]


@pytest.mark.parametrize("parts", FUSED_STAGES, ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter, where exp overflows to a right 0
def test_gelu_then_quantize(parts: dict[str, int], symmetric: bool) -> None:
    """GELU in its tanh form before the stages, against float64."""
    x, stages = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 3, make_stages(64, **parts)
    x[0], x[1] = 0.0, torch.linspace(-60, 60, 64)
    exact = functional.gelu(x.double(), approximate="tanh")
    actual = unsigned(triton_gpu.gelu_quantize(x.to(DEVICE), moved(stages), 8, symmetric))
    assert_near_levels(actual, reference.quantize_activation(exact, stages, 8, symmetric))


@pytest.mark.parametrize("parts", FUSED_STAGES, ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_modulation_then_quantize(parts: dict[str, int], dtype: torch.dtype) -> None:
    """adaLN of each sample of a batch with its own modulation, read out of a wider tensor, against float64."""
    source = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, 64, generator=source) * 4 + 2).to(dtype)
    x[0, 0] = 1.5  # constant: its norm is zero
    modulation = torch.randn(3, 6, 64, generator=source).to(dtype)
    shift, factor = modulation[:, 1:2], modulation[:, 2:3]
    stages = make_stages(64, **parts)
    exact = functional.layer_norm(x.double(), (64,), eps=1e-6) * (1 + factor.double()) + shift.double()
    on_device = modulation.to(DEVICE)
    actual = triton_gpu.layer_norm_quantize(x.to(DEVICE), on_device[:, 1:2], on_device[:, 2:3], moved(stages), 8, False)
    assert_near_levels(unsigned(actual), reference.quantize_activation(exact, stages, 8, False))


def test_misfits_are_named() -> None:
    """What does not fit gets the sentence that every backend gives."""
    x = torch.ones(2, 64, device=DEVICE)
    with pytest.raises(ShapeError, match=r"hadamard_block=128 .*\[32, 64\]"):
        triton_gpu.quantize_activation(x, InputStages(hadamard_block=128), 8, True)
    with pytest.raises(ShapeError, match="use 2 to 8"):
        triton_gpu.quantize_activation(x, NO_STAGES, 16, True)
    with pytest.raises(ShapeError, match=r"twice \(batch, channels\)"):
        triton_gpu.layer_norm_quantize(x, x, x, NO_STAGES, 8, True)
