"""Invariants 1, 2, 3 and 6: greedy rotations and the serpentine permutation."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import ShapeError
from trdq_core.numerics.hadamard import rotate_blocks
from trdq_core.transforms.rotation import base_rotation, choose_block, greedy_rotation, serpentine_permutation


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def outliers(tokens: int = 256, channels: int = 256) -> torch.Tensor:
    x = torch.randn(tokens, channels, generator=generator())
    x[:, ::37] *= 30
    return x


@pytest.mark.parametrize("size", [2, 4, 16, 64, 128])
def test_invariant_01_invariant_02_base_rotation_is_orthogonal_with_a_constant_first_column(size: int) -> None:
    base = base_rotation(size, generator())
    assert (base.T @ base - torch.eye(size)).abs().max() <= 1e-12
    assert torch.allclose(base[:, 0].abs(), torch.full((size,), size**-0.5, dtype=torch.float64), atol=1e-12)
    assert base[:, 0].sign().unique().numel() == 1


def test_invariant_01_a_product_of_many_greedy_steps_stays_orthogonal() -> None:
    rotation = greedy_rotation(outliers(), 64, 256, generator())
    assert (rotation.T @ rotation - torch.eye(64)).abs().max() <= 1e-12


def test_invariant_06_the_peak_never_grows_and_outliers_shrink() -> None:
    x = outliers()
    before = x.max() - x.min()
    rotated = rotate_blocks(x, greedy_rotation(x, 64, 256, generator()))
    assert rotated.max() - rotated.min() < 0.5 * before


def test_invariant_06_an_already_flat_input_may_stay_as_it_is() -> None:
    flat = torch.ones(4, 8) * torch.tensor([1.0, -1.0]).repeat(4)
    rotated = rotate_blocks(flat, greedy_rotation(flat, 8, 64, generator()))
    assert rotated.max() - rotated.min() <= 2 + 1e-6


def test_invariant_03_serpentine_is_a_permutation_that_balances_the_blocks() -> None:
    score = torch.rand(256, generator=generator())
    permutation = serpentine_permutation(score, 64).long()
    assert torch.equal(permutation.sort().values, torch.arange(256))
    inverse = permutation.argsort()
    assert torch.equal(score[permutation][inverse], score)
    sums = score[permutation].reshape(4, 64).sum(1)
    assert sums.max() - sums.min() <= score.max()


def test_invariant_03_within_a_block_channels_stand_in_order_of_size() -> None:
    score = torch.rand(32, generator=generator())
    assert (score[serpentine_permutation(score, 8).long()].reshape(4, 8).diff(dim=1) <= 0).all()


def test_invariant_09_blocks_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ShapeError, match=r"blocks\.3\.ff: block=128 does not divide 96 channels; use .* 32"):
        choose_block(96, 96, 128, dense=True, layer="blocks.3.ff")
    with pytest.raises(ShapeError, match="7 channels cannot be split"):
        choose_block(7, 64, None, dense=False)


def test_automatic_blocks_keep_dense_rotations_cheap() -> None:
    assert choose_block(1152, 4608, None, dense=True) == 128
    assert choose_block(256, 256, None, dense=False) == 128
    for channels, outputs in ((256, 256), (1024, 256), (256, 768)):
        block = choose_block(channels, outputs, None, dense=True)
        assert 2 * 2 * block**2 <= 0.05 * 4 * channels * outputs, "bytes"
        assert 2 * block <= 0.25 * outputs, "work"
