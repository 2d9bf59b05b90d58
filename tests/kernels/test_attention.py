"""The C++ attention against float64, with float32 and with int8 products."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import generator
from trdq_core.errors import ShapeError
from trdq_core.kernels.surroundings import attend, attend_int8

# items, heads, rows, keys, width of a head
SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 4), (1, 2, 37, 70, 72), (2, 1, 64, 64, 64), (1, 1, 100, 300, 33)]


def operands(sizes: tuple[int, ...], spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (items, tokens, heads * width)."""
    items, heads, rows, keys, width = sizes
    source = generator(sum(sizes))
    q = spread * torch.randn(items, rows, heads * width, generator=source)
    k, v = torch.randn(2, items, keys, heads * width, generator=source).unbind()
    return q, k, v


@pytest.mark.parametrize("sizes", SIZES)
def test_float32_matches_float64(native_backend: ModuleType, threads: int, sizes: tuple[int, ...]) -> None:
    """Odd sizes, one token, unequal numbers of rows and keys; small and large scores."""
    for spread in (1.0, 30.0):
        q, k, v = operands(sizes, spread)
        expected = attend(q.double(), k.double(), v.double(), sizes[1])
        actual = native_backend.attend(q, k, v, sizes[1]).double()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * spread * float(expected.abs().max()))


@pytest.mark.parametrize("sizes", SIZES)
def test_int8_matches_its_oracle(native_backend: ModuleType, threads: int, sizes: tuple[int, ...]) -> None:
    """The oracle rounds the same operands in float64; a tie of rounding moves one level of a key or of a probability."""
    q, k, v = operands(sizes)
    expected = attend_int8(q, k, v, sizes[1])
    actual = native_backend.attend(q, k, v, sizes[1], bits=8)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.01 * float(v.abs().max()))
    assert float((actual - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6


def test_int8_is_near_the_exact_attention(native_backend: ModuleType) -> None:
    """Within two per cent, and a large mean key, which no softmax sees, costs nothing."""
    q, k, v = operands((2, 2, 80, 80, 64))
    exact = attend(q.double(), k.double(), v.double(), 2)
    plain = native_backend.attend(q, k, v, 2, bits=8).double()
    moved = native_backend.attend(q, k + 50, v, 2, bits=8).double()
    for actual in (plain, moved):
        assert float((actual - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (2, 3, 6, 9), (1, 1, 6, 9)])
def test_masks_are_added(native_backend: ModuleType, bits: int, shape: tuple[int, ...]) -> None:
    """One for all rows or one for each; what -inf or -10000 hides contributes nothing."""
    q, k, v = operands((2, 3, 6, 9, 16))
    mask = torch.zeros(shape)
    mask[..., 5:7], mask[..., 8] = -10000.0, float("-inf")
    kept = [0, 1, 2, 3, 4, 7]
    actual = native_backend.attend(q, k, v, 3, mask, bits)
    expected = attend(q.double(), k.double(), v.double(), 3, mask.double()).float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=(0.05 if bits else 1e-5))
    poisoned = v.clone()
    poisoned[:, [5, 6, 8]] = 0
    if bits == 0:
        assert torch.equal(native_backend.attend(q, k, poisoned, 3, mask), actual)
        torch.testing.assert_close(native_backend.attend(q, k[:, kept], v[:, kept], 3), actual, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [0, 8])
def test_rows_that_see_nothing_become_zero(native_backend: ModuleType, threads: int, bits: int) -> None:
    """As torch's attention gives them; the other rows do not change, nor does an item that sees everything."""
    q, k, v = operands((2, 3, 60, 70, 16))
    mask = torch.zeros(2, 1, 60, 70)
    mask[0, :, [0, 5, 59]] = float("-inf")
    mask[0, :, 7, 3:] = float("-inf")
    actual = native_backend.attend(q, k, v, 3, mask, bits)
    expected = attend(q.double(), k.double(), v.double(), 3, mask.double()).float()
    assert torch.equal(expected[0, [0, 5, 59]], torch.zeros(3, 48))
    assert torch.equal(actual[0, [0, 5, 59]], torch.zeros(3, 48))
    torch.testing.assert_close(actual, expected, rtol=0, atol=(0.05 if bits else 1e-5))
    oracle = attend_int8(q, k, v, 3, mask) if bits else expected
    torch.testing.assert_close(actual, oracle, rtol=0, atol=(0.01 * float(v.abs().max()) if bits else 1e-5))
    whole = torch.full((1, 1, 1, 70), float("-inf"))
    assert torch.equal(native_backend.attend(q, k, v, 3, whole, bits), torch.zeros(2, 60, 48))


@pytest.mark.parametrize("bits", [0, 8])
def test_masks_of_truth_values(native_backend: ModuleType, bits: int) -> None:
    """True takes part, as in torch's attention."""
    q, k, v = operands((2, 3, 6, 9, 16))
    mask = torch.rand(2, 1, 6, 9, generator=generator()) < 0.6
    mask[1, :, 2] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    actual = native_backend.attend(q, k, v, 3, mask, bits)
    assert torch.equal(actual, native_backend.attend(q, k, v, 3, added, bits))
    expected = attend(q.double(), k.double(), v.double(), 3, mask).float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=(0.05 if bits else 1e-5))


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(native_backend: ModuleType, bits: int, bad: float) -> None:
    """A NaN or infinity in q, k or v never becomes a number: where torch's attention has none, neither has this one."""
    sizes = (2, 2, 20, 37, 24)
    for part in range(3):
        parts = operands(sizes)
        parts[part][0, 3, 5] = bad
        expected = attend(*(x.double() for x in parts), 2)
        actual = native_backend.attend(*parts, 2, bits=bits)
        assert bool(torch.isfinite(actual[1]).all())
        assert bool(torch.isfinite(actual[0, :, 24:]).all())  # the other head
        lost = ~torch.isfinite(expected)
        assert bool(lost.any())
        assert not bool(torch.isfinite(actual[lost]).any())
    q, k, v = operands(sizes)
    mask = torch.full((1, 1, 1, 37), float("-inf"))
    mask[..., 4] = float("nan")
    assert bool(torch.isnan(native_backend.attend(q, k, v, 2, mask, bits)).all())


@pytest.mark.parametrize("bits", [0, 8])
def test_slices_of_one_product(native_backend: ModuleType, bits: int) -> None:
    """q, k and v lie side by side in one tensor, as the fused projections leave them."""
    together = torch.randn(2, 10, 3 * 32, generator=generator())
    parts = together.split(32, -1)
    copies = [part.contiguous() for part in parts]
    assert torch.equal(native_backend.attend(*parts, 2, bits=bits), native_backend.attend(*copies, 2, bits=bits))


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4])
def test_zero_tiny_and_huge_operands(native_backend: ModuleType, bits: int, size: float) -> None:
    """No row becomes NaN: equal scores share, one large score takes all."""
    q, k, v = operands((1, 2, 12, 20, 8))
    actual = native_backend.attend(size * q, size * k, v, 2, bits=bits)
    assert bool(torch.isfinite(actual).all())
    if size < 1:
        expected = v.mean(1, keepdim=True).expand_as(actual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=(0.02 if bits else 1e-5))


def test_results_do_not_depend_on_the_number_of_threads(native_backend: ModuleType) -> None:
    """Heads are cut among threads by rows; every row is computed alike."""
    q, k, v = operands((1, 1, 500, 64, 32))
    alone = native_backend.attend(q, k, v, 1)
    torch.set_num_threads(2)
    assert torch.equal(native_backend.attend(q, k, v, 1), alone)


def test_misfits_are_named(cpp: ModuleType) -> None:
    """Heads that do not divide the channels, another number of keys, a mask of another size."""
    q, k, v = operands((1, 2, 4, 6, 8))
    with pytest.raises(ShapeError, match="3 heads"):
        cpp.attend(q, k, v, 3)
    with pytest.raises(ShapeError, match="do not belong together"):
        cpp.attend(q, k, v[:, :5], 2)
    with pytest.raises(ShapeError, match="mask"):
        cpp.attend(q, k, v, 2, torch.zeros(1, 1, 1, 5))
    with pytest.raises(ShapeError, match=r"mask is torch\.int64"):
        cpp.attend(q, k, v, 2, torch.ones(1, 1, 1, 6, dtype=torch.int64))
    assert cpp.attend(q[:, :0], k, v, 2).shape == (1, 0, 16)
