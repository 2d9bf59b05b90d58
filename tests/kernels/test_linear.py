"""Packing, and the integer product of every backend against the reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import generator, make_input, make_stages, make_weight
from trdq_core.errors import BackendUnavailable, ShapeError
from trdq_core.kernels import dispatch, reference
from trdq_core.kernels.packing import folded_weight, pack_weight, to_panels, to_rows, unpack_weight
from trdq_core.kernels.types import NO_STAGES, PackedWeight, QuantizedActivation, StaticGrid, row_shape

# tokens, in_features, out_features: the row tile is 6, the panel 64, nibbles come in eights
SHAPES = [
    (1, 8, 1),
    (1, 64, 64),
    (7, 33, 5),
    (6, 36, 63),
    (5, 100, 65),
    (11, 128, 130),
    (50, 260, 100),
    (97, 512, 192),
]


def assert_close_to_reference(
    actual: Tensor, activation: QuantizedActivation, weight: PackedWeight, bias: Tensor | None
) -> None:
    """The integer part is exact everywhere; what is left is float32 rounding of scales and sums."""
    expected = reference.linear(activation, weight, bias)
    assert actual.dtype == torch.float32
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (64, 64), (65, 100), (130, 260)])
def test_pack_and_unpack_round_trip(shape: tuple[int, int], bits: int) -> None:
    """Every level of every position comes back, whatever the padding."""
    limit = 2 ** (bits - 1)
    q = torch.randint(-limit, limit, shape, generator=generator()).to(torch.int8)
    packed = pack_weight(q, torch.ones(shape[0]), None, None, bits)
    assert torch.equal(unpack_weight(packed), q)
    assert torch.equal(packed.column_sum, q.sum(dim=1).float())
    assert packed.bits == (4 if bits <= 4 else 8)
    assert packed.data.is_contiguous()


@pytest.mark.parametrize(("bits", "groups"), [(8, 0), (4, 0), (4, 4), (3, 0)])
@pytest.mark.parametrize("shape", [(1, 4), (5, 100), (65, 260)])
def test_rows_and_panels_hold_the_same(shape: tuple[int, int], bits: int, groups: int) -> None:
    """The layout of the GPU kernels keeps every number, pads 4 bits to chunks of 128 channels, and goes back."""
    panels = make_weight(*shape, bits, groups=groups, zero_point=True)
    rows = to_rows(panels)
    assert rows.data.shape == row_shape(panels.bits, shape[1], shape[0])
    assert torch.equal(unpack_weight(rows), unpack_weight(panels))
    assert torch.equal(folded_weight(rows), folded_weight(panels))
    assert torch.equal(to_panels(rows).data, panels.data)
    assert to_rows(rows) is rows
    assert to_panels(panels) is panels
    activation = reference.quantize_activation(make_input(3, shape[1]), NO_STAGES, 8, False)
    assert torch.equal(reference.linear(activation, rows), reference.linear(activation, panels))


def test_a_nibble_of_a_row_stands_where_the_layout_says() -> None:
    """Byte j of a chunk: channel j in the low nibble, channel 64 + j in the high one, two's complement."""
    q = torch.zeros(1, 200, dtype=torch.int8)
    q[0, 3], q[0, 64 + 3], q[0, 128 + 5] = -8, 7, -1
    data = to_rows(pack_weight(q, torch.ones(1), None, None, 4)).data
    assert data.shape == (1, 128)
    assert int(data[0, 3]) == 0x78
    assert int(data[0, 64 + 5]) == 0x0F
    assert int(data.count_nonzero()) == 2


def test_rows_are_refused_by_the_cpu_kernels(cpp: ModuleType) -> None:
    """A weight that lies for the GPU names the way back."""
    activation = reference.quantize_activation(make_input(2, 64), NO_STAGES, 8, True)
    with pytest.raises(ShapeError, match="to_panels"):
        cpp.linear(activation, to_rows(make_weight(8, 64, 8)))


def test_group_scale_is_folded() -> None:
    """The product's integers are level times group scale, -128..112, and the column sums are theirs."""
    weight = make_weight(70, 128, 4, groups=4)
    expected = unpack_weight(weight).int() * weight.group_scale.int().repeat_interleave(32, dim=1)
    assert torch.equal(folded_weight(weight).int(), expected)
    assert torch.equal(weight.column_sum, expected.sum(dim=1).float())
    assert int(expected.min()) == -128


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_matches_reference(
    backend: ModuleType,
    shape: tuple[int, int, int],
    bits: int,
    symmetric: bool,
    zero_point: bool,
    has_bias: bool,
) -> None:
    """All zero points, with and without bias, at sizes around the tiles."""
    tokens, in_features, out_features = shape
    activation = reference.quantize_activation(make_input(tokens, in_features), NO_STAGES, 8, symmetric)
    weight = make_weight(out_features, in_features, bits, zero_point=zero_point)
    bias = torch.randn(out_features, generator=generator()) if has_bias else None
    assert_close_to_reference(backend.linear(activation, weight, bias), activation, weight, bias)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("width", "groups"), [(128, 1), (128, 4), (256, 32), (96, 24), (60, 5)])
def test_group_scales(backend: ModuleType, threads: int, width: int, groups: int, zero_point: bool) -> None:
    """Groups of 128, 32 and 8 channels run in the panels; groups of 4 and 12 take the slower way and are right too."""
    activation = reference.quantize_activation(make_input(29, width), NO_STAGES, 8, False)
    weight = make_weight(130, width, 4, groups=groups, zero_point=zero_point)
    assert_close_to_reference(backend.linear(activation, weight, None), activation, weight, None)


@pytest.mark.parametrize("activation_bits", [8, 6, 4])
@pytest.mark.parametrize("weight_bits", [8, 6, 4, 3])
def test_bit_widths(backend: ModuleType, threads: int, weight_bits: int, activation_bits: int) -> None:
    """Fewer bits run through the same product, from float input to float output."""
    x, stages = make_input(40, 256), make_stages(256, scale=True, hadamard=128)
    activation = backend.quantize_activation(x, stages, activation_bits, True)
    weight = make_weight(96, 256, weight_bits)
    assert_close_to_reference(backend.linear(activation, weight), activation, weight, None)


@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_levels_do_not_overflow(backend: ModuleType, bits: int) -> None:
    """The largest sums that can occur: all levels at their ends, on a long row."""
    width, low = 8192, -(2 ** (bits - 1))
    q = torch.full((66, width), low, dtype=torch.int8)
    weight = pack_weight(q, torch.ones(66), torch.full((66,), -low - 1.0), None, bits)
    values = torch.full((7, width), 255, dtype=torch.uint8)
    activation = QuantizedActivation(values, torch.ones(7), torch.zeros(7), values.sum(1, dtype=torch.int32))
    assert_close_to_reference(backend.linear(activation, weight), activation, weight, None)


def test_large_product(backend: ModuleType, threads: int) -> None:
    """Several blocks of rows and panels over the threads."""
    activation = reference.quantize_activation(make_input(300, 1152), NO_STAGES, 8, True)
    for bits, groups in ((8, 0), (4, 9)):
        weight = make_weight(200, 1152, bits, groups=groups)
        assert_close_to_reference(backend.linear(activation, weight), activation, weight, None)


def test_empty_products(backend: ModuleType) -> None:
    """No tokens give (0, out_features)."""
    activation = backend.quantize_activation(torch.empty(0, 64), NO_STAGES, 8, True)
    assert backend.linear(activation, make_weight(10, 64, 8), torch.ones(10)).shape == (0, 10)


def test_one_set_of_a_stack_and_unaligned_data(backend: ModuleType) -> None:
    """Weights indexed from a (sets, ...) stack work without a copy, and at any byte offset, as in a mapped file."""
    weights = [make_weight(70, 128, 8, seed=seed) for seed in range(3)]
    activation = reference.quantize_activation(make_input(9, 128), NO_STAGES, 8, True)
    stack = torch.stack([weight.data for weight in weights])
    shifted = torch.empty(stack[1].numel() + 3, dtype=torch.int8)[3:].view_as(stack[1]).copy_(stack[1])
    for data in (stack[1], shifted):
        assert data.is_contiguous()
        assert_close_to_reference(
            backend.linear(activation, weights[1]._replace(data=data)), activation, weights[1], None
        )


def test_memory_mapped_weight(backend: ModuleType, tmp_path: Path) -> None:
    """Weights read straight from a file's pages, as switched storage does."""
    weight = make_weight(70, 128, 4, groups=4)
    path = tmp_path / "weight.bin"
    path.write_bytes(weight.data.numpy().tobytes())
    mapped = torch.from_file(str(path), size=weight.data.numel(), dtype=torch.uint8).view_as(weight.data)
    activation = reference.quantize_activation(make_input(9, 128), NO_STAGES, 8, True)
    result = backend.linear(activation, weight._replace(data=mapped))
    assert_close_to_reference(result, activation, weight, None)


def test_calls_from_several_python_threads(cpp: ModuleType) -> None:
    """The library keeps its memory per thread and lets go of the interpreter: calls may overlap."""
    weight, stages = make_weight(130, 256, 4, groups=2), make_stages(256, rotation=128, permute=True, hadamard=64)
    inputs = [make_input(40 + i, 256, seed=i) for i in range(8)]

    def run(x: Tensor) -> Tensor:
        return cpp.linear_from_float(x, stages, weight, None, 8, True)

    torch.set_num_threads(2)
    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for actual, wanted in zip(pool.map(run, inputs), expected, strict=True):
                assert torch.equal(actual, wanted)


def test_half_precision_scales(backend: ModuleType) -> None:
    """A module cast with .half() casts its scales too; the product still reads them right."""
    weight = make_weight(70, 64, 8)
    cast = weight._replace(scale=weight.scale.half(), column_sum=weight.column_sum.half())
    activation = reference.quantize_activation(make_input(9, 64), NO_STAGES, 8, True)
    torch.testing.assert_close(
        backend.linear(activation, cast, torch.ones(70).half()),
        reference.linear(activation, cast, torch.ones(70)),
        rtol=1e-3,
        atol=1e-2,
    )


@pytest.mark.parametrize("name", dispatch.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_from_float(name: dispatch.Backend, dtype: torch.dtype) -> None:
    """Leading dimensions and dtype of the input are kept, and the result is near the float product."""
    try:
        dispatch.select_backend(torch.device("cpu"), name)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    x = torch.randn(2, 5, 128, generator=generator()).to(dtype)
    weight, bias = make_weight(70, 128, 8), torch.randn(70, generator=generator())
    weight = to_rows(weight) if name == "triton" else weight
    y = dispatch.linear_from_float(x, NO_STAGES, weight, bias, 8, True, backend=name)
    assert y.shape == (2, 5, 70)
    assert y.dtype == dtype
    exact = x.double() @ (unpack_weight(weight).double() * weight.scale.double()[:, None]).T + bias.double()
    assert float((y.double() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("width", [33, 128])
def test_linear_from_float_equals_its_two_halves(backend: ModuleType, threads: int, width: int, static: bool) -> None:
    """The one call gives what quantization and product give one after the other."""
    name = "torch" if backend.__name__.endswith("torch_eager") else "cpp"
    x, weight = make_input(17, width), make_weight(70, width, 8, zero_point=True)
    stages = make_stages(width, scale=True, permute=True)
    grid = StaticGrid(torch.tensor([0.1]), torch.tensor([100.0])) if static else None
    y = dispatch.linear_from_float(x, stages, weight, None, 8, False, grid, backend=name)
    levels = backend.quantize_activation(x, stages, 8, False, grid)
    assert torch.equal(y, backend.linear(levels, weight, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(4, 8)}, "give int8"),
        ({"scale": torch.ones(5)}, r"scale has shape \(5,\)"),
        ({"zero_point": torch.full((4,), 0.5)}, "has a fraction"),
        ({"q": torch.full((4, 8), 9, dtype=torch.int8)}, "stored as -8..7"),
        ({"group_scale": torch.ones(4, 3, dtype=torch.int8)}, "divides in_features=8"),
        ({"group_scale": torch.full((4, 2), 17, dtype=torch.int8)}, "keep it in 1..16"),
        ({"group_scale": torch.ones(4, 2, dtype=torch.int8), "bits": 8}, "up to 4 bits, not 8"),
        ({"bits": 9}, "use 2 to 8"),
    ],
)
def test_weights_that_cannot_be_packed(change: dict[str, object], message: str) -> None:
    """The message says what arrived and what is allowed."""
    arguments = {"q": torch.ones(4, 8, dtype=torch.int8), "scale": torch.ones(4), "bits": 4} | change
    with pytest.raises(ShapeError, match=message):
        pack_weight(**arguments)


def test_misfits_of_the_product_are_named(backend: ModuleType) -> None:
    """Widths and bias lengths that do not belong together."""
    activation = reference.quantize_activation(make_input(2, 64), NO_STAGES, 8, True)
    with pytest.raises(ShapeError, match="in_features=32"):
        backend.linear(activation, make_weight(8, 32, 8))
    with pytest.raises(ShapeError, match="out_features=8"):
        backend.linear(activation, make_weight(8, 64, 8), torch.ones(9))


def test_tensors_of_another_device_are_refused(cpp: ModuleType) -> None:
    """A pointer from another device never reaches the library."""
    with pytest.raises(BackendUnavailable, match="takes CPU tensors"):
        cpp.quantize_activation(torch.empty(2, 64, device="meta"), NO_STAGES, 8, True)


@pytest.mark.parametrize("bits", [8, 4])
def test_operators_pass_torchs_own_checks(cpp: ModuleType, bits: int) -> None:
    """Schema, shape functions and tracing of the custom operators."""
    x, weight = make_input(5, 64), make_weight(70, 64, bits, groups=0 if bits == 8 else 2, zero_point=True)
    stages = make_stages(64, scale=True, rotation=32, permute=True, hadamard=32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.trdq.transform, (x, *stages), test_utils=checks)
    torch.library.opcheck(torch.ops.trdq.quantize_activation, (x, *stages, 8, True, None, None, 0.9), test_utils=checks)
    levels = cpp.quantize_activation(x, stages, 8, True)
    torch.library.opcheck(torch.ops.trdq.linear, (*levels, *weight, torch.ones(70)), test_utils=checks)
    arguments = (x, *stages, 8, True, None, None, 0.9, *weight, torch.ones(70))
    torch.library.opcheck(torch.ops.trdq.linear_from_float, arguments, test_utils=checks)


def test_traces_without_a_break(cpp: ModuleType) -> None:
    """torch.compile sees one graph with the custom operators in it (eager backend: no code generation)."""
    weight, stages = make_weight(70, 64, 8), make_stages(64, scale=True, hadamard=32)

    def layer(x: Tensor) -> Tensor:
        return dispatch.linear_from_float(torch.sin(x), stages, weight, None, 8, True)

    x = make_input(5, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if dispatch.select_backend(x.device) != "cpp":
        pytest.skip("the automatic backend is not cpp here")
    torch.testing.assert_close(compiled(x), layer(x))
