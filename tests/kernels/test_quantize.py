"""Quantization and the online transform of every backend against the reference."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import make_input, make_stages
from trdq_core.errors import ShapeError
from trdq_core.kernels import reference
from trdq_core.kernels.types import NO_STAGES, InputStages, QuantizedActivation, StaticGrid

SHAPES = [(1, 1), (1, 64), (7, 33), (13, 100), (25, 128), (64, 260), (130, 48)]
COMBINATIONS = [
    {"scale": scale, "rotation": rotation, "permute": permute, "hadamard": hadamard, "second": second}
    for scale, rotation, permute, hadamard, second in itertools.product(
        (False, True), (0, 64), (False, True), (0, 128), (0, 32)
    )
]


def assert_same_levels(ours: QuantizedActivation, theirs: QuantizedActivation) -> None:
    """Bit-equal levels and grid."""
    for name, own, expected in zip(QuantizedActivation._fields, ours, theirs, strict=True):
        assert own.dtype == expected.dtype, name
        assert torch.equal(own, expected), f"{name} differs by up to {(own.double() - expected.double()).abs().max()}"


def assert_near_levels(ours: QuantizedActivation, theirs: QuantizedActivation) -> None:
    """Equal up to float32 rounding of the transform, which can move a value over a rounding tie: one level, rarely."""
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-5, atol=0)
    assert (ours.zero_point - theirs.zero_point).abs().max() <= 1
    # Compared without the zero point: where that moved by one, all stored levels of the row move with it.
    own = ours.values.float() - ours.zero_point[:, None]
    off = (own - (theirs.values.float() - theirs.zero_point[:, None])).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 2e-3
    assert torch.equal(ours.row_sum.long(), ours.values.long().sum(dim=1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_levels_without_stages_are_bit_equal(
    backend: ModuleType, shape: tuple[int, int], bits: int, symmetric: bool
) -> None:
    """No transform, no rounding to differ by: every backend divides by the scale and rounds half to even."""
    x = make_input(*shape)
    expected = reference.quantize_activation(x, NO_STAGES, bits, symmetric)
    assert_same_levels(backend.quantize_activation(x, NO_STAGES, bits, symmetric), expected)


@pytest.mark.parametrize("clip", [0.9, 0.5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clipped_range_saturates_alike(backend: ModuleType, symmetric: bool, clip: float) -> None:
    """The clip factor scales the live range: same levels everywhere, and the largest value ends at the last one."""
    x = make_input(31, 384)
    expected = reference.quantize_activation(x, NO_STAGES, 4, symmetric, None, clip)
    assert_same_levels(backend.quantize_activation(x, NO_STAGES, 4, symmetric, None, clip), expected)
    full = reference.quantize_activation(x, NO_STAGES, 4, symmetric)
    torch.testing.assert_close(expected.scale, full.scale * clip)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_ties_go_to_even(backend: ModuleType, symmetric: bool) -> None:
    """Values exactly between two levels end at the even one, as in the reference."""
    x = torch.arange(-127, 128).float()[None] * 0.5
    x = torch.cat((x, torch.tensor([[127.0]])), dim=1)
    expected = reference.quantize_activation(x, NO_STAGES, 8, symmetric)
    assert_same_levels(backend.quantize_activation(x, NO_STAGES, 8, symmetric), expected)


@pytest.mark.parametrize("parts", COMBINATIONS, ids=lambda parts: "+".join(k for k, v in parts.items() if v) or "none")
def test_transform_matches_float64(backend: ModuleType, parts: dict[str, int]) -> None:
    """Every combination of stages, with an error of float32 size."""
    x, stages = make_input(31, 384), make_stages(384, **parts)
    expected = reference.transform(x.double(), stages)
    actual = backend.transform(x, stages)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("parts", COMBINATIONS[1:], ids=lambda parts: "+".join(k for k, v in parts.items() if v))
def test_levels_with_stages(backend: ModuleType, parts: dict[str, int], symmetric: bool) -> None:
    """Levels of the transformed input are those of the reference but for rounding ties."""
    x, stages = make_input(31, 384), make_stages(384, **parts)
    expected = reference.quantize_activation(x, stages, 8, symmetric)
    assert_near_levels(backend.quantize_activation(x, stages, 8, symmetric), expected)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("width", [1, 3, 33, 130])
def test_a_permutation_of_any_width(backend: ModuleType, width: int, scale: bool) -> None:
    """It applies the scale by itself, and the last channels do not fill a register."""
    x, stages = make_input(7, width), make_stages(width, scale=scale, permute=True)
    expected = reference.transform(x.double(), stages)
    torch.testing.assert_close(backend.transform(x, stages).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("parts", [{"scale": True}, {"rotation": 64}, {"scale": True, "rotation": 64}], ids=str)
def test_a_rotation_of_wide_rows_behind_a_permutation(backend: ModuleType, parts: dict[str, int]) -> None:
    """Wide tiles are gathered in a pass of their own, narrow ones by the rotation."""
    x, stages = make_input(13, 4608), make_stages(4608, permute=True, second=64, **parts)
    expected = reference.transform(x.double(), stages)
    actual = backend.transform(x, stages).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [1, 12, 29])
@pytest.mark.parametrize(("width", "rotation"), [(96, 96), (128, 128), (60, 12), (21, 7), (1152, 128), (48, 16)])
def test_rotations_of_any_size(backend: ModuleType, tokens: int, width: int, rotation: int) -> None:
    """Row counts around the tile of the kernel, and blocks that no register width divides."""
    x, stages = (
        make_input(tokens, width),
        make_stages(width, rotation=rotation, permute=True, second=rotation),
    )
    expected = reference.transform(x.double(), stages)
    actual = backend.transform(x, stages).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_hadamard_blocks(backend: ModuleType, block: int) -> None:
    """Each block size, applied twice, gives the input back."""
    x, stages = make_input(9, 512), InputStages(hadamard_block=block)
    there = backend.transform(x, stages)
    torch.testing.assert_close(there, reference.transform(x, stages), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(backend.transform(there, stages), x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-13, 1e-6, 1e6, 1e30, 3e37])
def test_huge_and_tiny_values(backend: ModuleType, factor: float, symmetric: bool) -> None:
    """All-zero rows and rows at the ends of float32 keep a usable scale."""
    x = make_input(5, 70).clamp(-5, 5) * factor
    expected = reference.quantize_activation(x, NO_STAGES, 8, symmetric)
    actual = backend.quantize_activation(x, NO_STAGES, 8, symmetric)
    assert_same_levels(actual, expected)
    assert bool((actual.scale > 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_sided_rows(backend: ModuleType, symmetric: bool) -> None:
    """Zero stays on the grid even where a row is all positive or all negative."""
    x = torch.cat((make_input(3, 50).abs() + 1, -make_input(3, 50).abs() - 1))
    expected = reference.quantize_activation(x, NO_STAGES, 8, symmetric)
    assert_same_levels(backend.quantize_activation(x, NO_STAGES, 8, symmetric), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_static_grid(backend: ModuleType, bits: int, symmetric: bool) -> None:
    """A calibrated grid is used for every token, values beyond it are clipped, and far ones do not wrap."""
    x = make_input(9, 130)
    x[0, 0], x[1, 1] = 1e30, -1e30
    grid = StaticGrid(torch.tensor([0.05]), torch.tensor([128.0 if symmetric else 6.0]))
    expected = reference.quantize_activation(x, NO_STAGES, bits, symmetric, grid)
    actual = backend.quantize_activation(x, NO_STAGES, bits, symmetric, grid)
    assert_same_levels(actual, expected)
    assert bool((actual.scale == grid.scale).all())


def strided(x: Tensor) -> list[Tensor]:
    """The same numbers in layouts that are not contiguous."""
    wide = torch.stack((x, x), dim=-1)
    return [wide[..., 0], x.T.contiguous().T, torch.cat((x, x), dim=-1)[:, : x.shape[1]]]


def test_non_contiguous_input(backend: ModuleType) -> None:
    """Strides do not change the result; leading dimensions are flattened to tokens."""
    x, stages = make_input(10, 64), make_stages(64, scale=True, hadamard=64)
    expected = backend.quantize_activation(x, stages, 8, True)
    for view in strided(x):
        assert_same_levels(backend.quantize_activation(view, stages, 8, True), expected)
    assert_same_levels(backend.quantize_activation(x.view(2, 5, 64), stages, 8, True), expected)


def test_non_contiguous_stages(backend: ModuleType) -> None:
    """A transposed rotation and slices of a stack are read through their strides."""
    x, rotation = make_input(10, 64), make_stages(64, rotation=32).rotation
    expected = backend.transform(x, InputStages(rotation=rotation.T.contiguous(), inverse_scale=torch.full((64,), 2.0)))
    actual = backend.transform(x, InputStages(rotation=rotation.T, inverse_scale=torch.full((64, 3), 2.0)[:, 1]))
    assert torch.equal(actual, expected)


def test_no_tokens(backend: ModuleType) -> None:
    """Zero tokens give empty levels, with and without stages."""
    for stages in (NO_STAGES, make_stages(64, scale=True, rotation=32, permute=True, hadamard=32)):
        for symmetric in (True, False):
            values, scale, zero_point, row_sum = backend.quantize_activation(torch.empty(0, 64), stages, 8, symmetric)
            assert values.shape == (0, 64)
            assert scale.shape == zero_point.shape == row_sum.shape == (0,)
        assert backend.transform(torch.empty(2, 0, 64), stages).shape == (2, 0, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(backend: ModuleType, dtype: torch.dtype) -> None:
    """Half types go to float32 before anything else; the transform comes back in the input's type."""
    x = make_input(6, 64).to(dtype)
    assert_same_levels(
        backend.quantize_activation(x, NO_STAGES, 8, True),
        reference.quantize_activation(x.float(), NO_STAGES, 8, True),
    )
    assert backend.transform(x, make_stages(64, hadamard=64)).dtype == dtype


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_does_not_crash(backend: ModuleType, bad: float, symmetric: bool) -> None:
    """Rows with NaN or infinity give some levels; the other rows stay right."""
    x, stages = (
        make_input(8, 128),
        make_stages(128, scale=True, rotation=64, permute=True, hadamard=128, second=32),
    )
    x[3, 5] = bad
    for parts in (NO_STAGES, stages):
        actual = backend.quantize_activation(x, parts, 8, symmetric)
        expected = reference.quantize_activation(x[:3], parts, 8, symmetric)
        assert_near_levels(QuantizedActivation(*(field[:3] for field in actual)), expected)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (InputStages(inverse_scale=torch.ones(63)), r"inverse_scale .*64 channels need"),
        (InputStages(inverse_scale=torch.ones(64).double()), r"inverse_scale is torch.float64"),
        (InputStages(rotation=torch.eye(48)), r"rotation .*size divides 64"),
        (InputStages(second_rotation=torch.ones(32, 16)), r"second_rotation .*square"),
        (InputStages(permutation=torch.arange(64)), r"permutation is torch.int64"),
        (InputStages(hadamard_block=128), r"hadamard_block=128 .*\[32, 64\]"),
    ],
)
def test_misfits_are_named(backend: ModuleType, stages: InputStages, message: str) -> None:
    """A stage that does not fit the input is named with what would fit."""
    with pytest.raises(ShapeError, match=message):
        backend.quantize_activation(torch.ones(2, 64), stages, 8, True)


def test_permutation_outside_the_row_is_refused(cpp: ModuleType) -> None:
    """The gather never reads foreign memory."""
    for bad in (64, -1):
        permutation = torch.arange(64, dtype=torch.int32)
        permutation[7] = bad
        with pytest.raises(ShapeError, match=r"indices 0\.\.63"):
            cpp.transform(torch.ones(2, 64), InputStages(permutation=permutation))


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_out_of_range(backend: ModuleType, bits: int) -> None:
    """The message lists what is allowed."""
    with pytest.raises(ShapeError, match="use 2 to 8"):
        backend.quantize_activation(torch.ones(2, 64), NO_STAGES, bits, True)
