"""Triton's matrix products against the reference: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import generator, make_input, make_stages, make_weight
from tests.kernels.test_linear import assert_close_to_reference
from tests.kernels.triton_device import DEVICE, moved, signed, unsigned
from trdq_core.errors import ShapeError
from trdq_core.kernels import dispatch, reference, triton_gpu
from trdq_core.kernels.packing import pack_weight, to_rows
from trdq_core.kernels.types import NO_STAGES, PackedWeight, QuantizedActivation
from trdq_core.nn.input_grid import InputGrid
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.presets import make_recipe
from trdq_core.timegroups import TimeContext, TimeGroups
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.rounding import quantize_weight

pytestmark = pytest.mark.usefixtures("triton")

# tokens, in_features, out_features: around the tile of 128 x 64 and the chunk of 128 channels
SHAPES = [(1, 8, 1), (7, 33, 5), (5, 100, 65), (3, 128, 64), (130, 260, 70)]


def product(activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """What the Triton kernel gives for the reference's levels and a weight in panels, on the CPU."""
    on_device = None if bias is None else bias.to(DEVICE)
    return triton_gpu.linear(signed(activation), moved(to_rows(weight)), on_device).cpu()


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_matches_reference(shape: tuple[int, int, int], bits: int, symmetric: bool, zero_point: bool) -> None:
    """All zero points, with and without bias, at sizes around the tiles: the sums are exact."""
    tokens, in_features, out_features = shape
    activation = reference.quantize_activation(make_input(tokens, in_features), NO_STAGES, 8, symmetric)
    weight = make_weight(out_features, in_features, bits, zero_point=zero_point)
    bias = torch.randn(out_features, generator=generator()) if symmetric else None
    assert_close_to_reference(product(activation, weight, bias), activation, weight, bias)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("width", "groups"), [(128, 1), (256, 2), (320, 5), (256, 32), (96, 24), (60, 5), (192, 3)])
def test_group_scales(width: int, groups: int, zero_point: bool) -> None:
    """One scale a half chunk, several, and groups that straddle its border."""
    activation = reference.quantize_activation(make_input(9, width), NO_STAGES, 8, False)
    weight = make_weight(40, width, 4, groups=groups, zero_point=zero_point)
    assert_close_to_reference(product(activation, weight), activation, weight, None)


@pytest.mark.parametrize("weight_bits", [8, 6, 3, 2])
def test_bit_widths(weight_bits: int) -> None:
    """Fewer bits run through the same two products, 2 and 3 in the container of 4."""
    activation = reference.quantize_activation(make_input(9, 128), NO_STAGES, 6, True)
    weight = make_weight(40, 128, weight_bits)
    assert weight.bits == (4 if weight_bits <= 4 else 8)
    assert_close_to_reference(product(activation, weight), activation, weight, None)


@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_levels_do_not_overflow(bits: int) -> None:
    """The largest sums that can occur, for bytes on the longest row that is taken."""
    width, low = 33_000 if bits == 8 else 4_096, -(2 ** (bits - 1))
    q = torch.full((3, width), low, dtype=torch.int8)
    weight = pack_weight(q, torch.ones(3), torch.full((3,), -low - 1.0), None, bits)
    values = torch.full((2, width), 255, dtype=torch.uint8)
    activation = QuantizedActivation(values, torch.ones(2), torch.zeros(2), values.sum(1, dtype=torch.int32))
    assert_close_to_reference(product(activation, weight), activation, weight, None)


def test_one_set_of_a_stack_and_strided_levels() -> None:
    """Weights indexed from (sets, ...) and rows of a wider tensor of levels are read right."""
    weights = [to_rows(make_weight(40, 128, 8, seed=seed)) for seed in range(3)]
    activation = reference.quantize_activation(make_input(6, 128), NO_STAGES, 8, True)
    stack = torch.stack([weight.data for weight in weights])
    levels = signed(activation)
    wide = levels._replace(values=torch.cat((levels.values, levels.values), dim=1)[:, :128])
    actual = triton_gpu.linear(wide, moved(weights[1]._replace(data=stack[1]))).cpu()
    assert_close_to_reference(actual, activation, weights[1], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_types_round_once(dtype: torch.dtype) -> None:
    """The epilogue writes the wanted type: as precise as rounding the float32 result."""
    activation = reference.quantize_activation(make_input(5, 64).clamp(-3, 3), NO_STAGES, 8, True)
    weight, bias = make_weight(40, 64, 8), torch.randn(40, generator=generator()).to(dtype)
    actual = triton_gpu.linear(signed(activation), moved(to_rows(weight)), bias.to(DEVICE), dtype).cpu()
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, reference.linear(activation, weight, bias).to(dtype))


def test_no_tokens() -> None:
    """No tokens give (0, out_features)."""
    activation = reference.quantize_activation(torch.empty(0, 64), NO_STAGES, 8, True)
    assert product(activation, make_weight(10, 64, 8), torch.ones(10)).shape == (0, 10)


def test_misfits_are_named() -> None:
    """Panels, unsigned levels and rows that are too long each name the way out."""
    activation = reference.quantize_activation(make_input(2, 64), NO_STAGES, 8, True)
    weight = moved(make_weight(8, 64, 8))
    with pytest.raises(ShapeError, match="to_rows"):
        triton_gpu.linear(signed(activation), weight)
    with pytest.raises(ShapeError, match="take signed ones"):
        triton_gpu.linear(moved(activation), to_rows(weight))
    with pytest.raises(ShapeError, match="in_features=64"):
        triton_gpu.linear(signed(reference.quantize_activation(make_input(2, 32), NO_STAGES, 8, True)), weight)
    long = to_rows(pack_weight(torch.ones(1, 33_001, dtype=torch.int8), torch.ones(1)))
    levels = signed(reference.quantize_activation(torch.ones(1, 33_001), NO_STAGES, 8, True))
    with pytest.raises(ShapeError, match="at most 33000"):
        triton_gpu.linear(levels, moved(long))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("readers", [1, 2])
def test_a_layer_through_the_dispatch(bits: int, readers: int) -> None:
    """A QuantizedLinear built for this backend holds rows and gives what its twin on the reference gives."""
    rule = make_recipe("rtn", weight_bits=bits, activation_bits=8).rules[0]
    stages = make_stages(64, scale=True, permute=True, hadamard=64)
    transform = InputTransform(stages.inverse_scale, None, stages.permutation, 64, None)
    weight = quantize_weight(make_input(40, 64, 2), rule.weight)
    layers = []
    for backend in ("triton", "reference"):
        time = TimeContext(TimeGroups())
        quantizer = InputQuantizer([transform], InputGrid(rule.activation), time=time, backend=backend, readers=readers)
        layer = QuantizedLinear([weight], torch.ones(40), quantizer, owns_input=True)
        # Moving chooses kernels anew; without a GPU the interpreter has what was asked for already.
        layers.append(layer if DEVICE.type == "cpu" else layer.to(DEVICE))
    x = make_input(6, 64).view(2, 3, 64).to(DEVICE)
    with torch.no_grad():
        ours, theirs = layers[0](x), layers[1](x)
    assert layers[0].qweight.dim() == 3  # (sets, out, bytes): rows
    assert layers[0].kernel.startswith("int8 Triton" if bits == 8 else "int4 packed Triton")
    assert layers[0].simulated is (DEVICE.type == "cpu")
    assert ours.shape == (2, 3, 40)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-3  # a rounding tie may move one level


@pytest.mark.parametrize("shape", [(1, 16, 1), (20, 72, 40), (130, 128, 65)])
def test_fp8_product(shape: tuple[int, int, int]) -> None:
    """e4m3 by e4m3 with a scale for each row, against float64 of the same rounded numbers."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 units")
    tokens, in_features, out_features = shape
    x, x_scale = triton_gpu.quantize_fp8(make_input(tokens, in_features))
    w, w_scale = triton_gpu.quantize_fp8(make_input(out_features, in_features, 1))
    bias = torch.randn(out_features, generator=generator())
    exact = (x.double() * x_scale.double()[:, None]) @ (w.double() * w_scale.double()[:, None]).T + bias.double()
    actual = triton_gpu.fp8_linear(*(part.to(DEVICE) for part in (x, x_scale, w, w_scale, bias))).cpu()
    torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_fp8_rows() -> None:
    """Rows reach e4m3's largest number whatever their size; zero rows stay zero; other types are refused."""
    rows, scale = triton_gpu.quantize_fp8(torch.tensor([[0.0, 0.0], [1e-20, -2e-20], [3e38, 1.0]]))
    assert rows.dtype is torch.float8_e4m3fn
    assert rows.float()[0].abs().max() == 0
    assert rows.float()[2, 0] == 448
    assert bool((scale > 0).all())
    with pytest.raises(ShapeError, match="float8_e4m3fn"):
        triton_gpu.fp8_linear(torch.ones(2, 16, device=DEVICE), scale, rows, scale)


def test_from_float_to_float() -> None:
    """Quantization and product together, through the dispatch, in the type of the input."""
    x, weight = make_input(6, 64).to(torch.bfloat16).view(2, 3, 64), make_weight(40, 64, 8)
    y = dispatch.linear_from_float(
        x.to(DEVICE), NO_STAGES, moved(to_rows(weight)), None, 8, True, backend="triton"
    ).cpu()
    levels = unsigned(triton_gpu.quantize_activation(x.to(DEVICE), NO_STAGES, 8, True))
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y.view(6, 40), reference.linear(levels, weight).to(torch.bfloat16))
