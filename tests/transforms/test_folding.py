"""Invariant 8: what is folded into the layer before leaves the output of the layer behind as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trdq_core.errors import ShapeError
from trdq_core.specs import TransformSpec
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.fit import fit_transform
from trdq_core.transforms.folding import (
    fold_into_linear,
    fold_into_modulation,
    fold_into_modulation_rows,
    fold_into_values,
    fold_through_activation,
)

TOKENS, WIDTH, OUT = 12, 64, 48
CHAIN = (
    TransformSpec(kind="smooth", alpha=0.3),
    TransformSpec(kind="greedy_rotation", block=16, steps=20),
    TransformSpec(kind="serpentine", block=16),
    TransformSpec(kind="hadamard", block=32, random_signs=True),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


def fitted(specs: tuple[TransformSpec, ...], rows: Tensor, weight: Tensor) -> InputTransform:
    return fit_transform(specs, rows=rows, absmax=rows.abs().amax(0).float(), weights=[weight], seed=0)


@pytest.mark.parametrize("with_bias", [True, False])
def test_invariant_08_smoothing_folds_into_the_rows_of_an_adaln_linear(with_bias: bool) -> None:
    condition, x = normal(3, 20, seed=1), functional.layer_norm(normal(3, TOKENS, WIDTH, seed=2), (WIDTH,))
    weight, bias = normal(6 * WIDTH, 20, seed=3), normal(6 * WIDTH, seed=4) if with_bias else None
    reader = normal(OUT, WIDTH, seed=5)

    def modulated(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale, _, mlp_shift, mlp_scale, _ = functional.linear(condition, weight, bias)[:, None].chunk(6, -1)
        return x * (1 + scale) + shift, x * (1 + mlp_scale) + mlp_shift

    attention, mlp = modulated(weight, bias)
    smooth = fitted((TransformSpec(kind="smooth", alpha=0.5),), attention.flatten(0, 1), reader)
    rows = {"scale_rows": slice(WIDTH, 2 * WIDTH), "shift_rows": slice(0, WIDTH)}
    folded_attention, folded_mlp = modulated(*fold_into_modulation_rows(weight, bias, smooth.inverse_scale, **rows))
    assert_same(folded_attention, smooth.apply(attention))
    assert_same(folded_attention @ smooth.apply_to_weight(reader).T, attention @ reader.T)
    assert torch.equal(folded_mlp, mlp), "the rows of the other modulation are left alone"


def test_invariant_08_smoothing_folds_into_a_table_of_modulations() -> None:
    x, inverse = normal(5, TOKENS, WIDTH), normal(WIDTH, seed=1).abs() + 0.1
    scale, shift = normal(5, 1, WIDTH, seed=2), normal(5, 1, WIDTH, seed=3)
    folded_scale, folded_shift = fold_into_modulation(scale, shift, inverse)
    assert_same(x * (1 + folded_scale) + folded_shift, (x * (1 + scale) + shift) * inverse)


@pytest.mark.parametrize("specs", [CHAIN[:1], CHAIN[1:2], CHAIN], ids=["scale", "rotation", "all"])
def test_any_transform_folds_into_a_linear_producer(specs: tuple[TransformSpec, ...]) -> None:
    x, weight, bias, reader = normal(TOKENS, 40), normal(WIDTH, 40), normal(WIDTH), normal(OUT, WIDTH)
    caption = functional.linear(x, weight, bias)
    transform = fitted(specs, caption, reader)
    folded = functional.linear(x, *fold_into_linear(weight, bias, transform))
    assert_same(folded, transform.apply(caption))
    assert_same(folded @ transform.apply_to_weight(reader).T, caption @ reader.T)


@pytest.mark.parametrize("with_bias", [True, False])
def test_scales_and_rotations_inside_heads_fold_into_the_values(with_bias: bool) -> None:
    heads, size = 2, WIDTH // 2
    x, weight, out = normal(TOKENS, 40), normal(WIDTH, 40), normal(OUT, WIDTH)
    bias = normal(WIDTH) if with_bias else None
    maps = normal(heads, TOKENS, TOKENS, seed=7).softmax(-1)

    def attend(weight: Tensor, bias: Tensor | None) -> Tensor:
        values = functional.linear(x, weight, bias).unflatten(-1, (heads, size)).transpose(0, 1)
        return (maps @ values).transpose(0, 1).flatten(1)

    plain = attend(weight, bias)
    transform = fitted((CHAIN[0], CHAIN[1], CHAIN[3]), plain, out)
    inside = torch.cat([torch.randperm(size), size + torch.randperm(size)]).to(torch.int32)
    transform = transform._replace(permutation=inside)
    folded = attend(*fold_into_values(weight, bias, transform, heads=heads))
    assert_same(folded, transform.apply(plain))
    assert_same(folded @ transform.apply_to_weight(out).T, plain @ out.T)


def test_a_permutation_folds_through_gelu() -> None:
    x, first, bias, second = normal(TOKENS, 40), normal(WIDTH, 40), normal(WIDTH), normal(OUT, WIDTH)
    hidden = functional.gelu(functional.linear(x, first, bias), approximate="tanh")
    transform = fitted((TransformSpec(kind="serpentine", block=16),), hidden, second)
    folded = functional.gelu(functional.linear(x, *fold_through_activation(first, bias, transform)), approximate="tanh")
    assert_same(folded, transform.apply(hidden))
    assert_same(folded @ transform.apply_to_weight(second).T, hidden @ second.T)


def test_what_does_not_pass_is_refused() -> None:
    weight = normal(WIDTH, 8)
    with pytest.raises(
        ShapeError, match=r"only a permutation passes through it, got H32; leave scale and rotation online"
    ):
        fold_through_activation(weight, None, InputTransform(hadamard_block=32))
    with pytest.raises(ShapeError, match=r"rotation blocks \[64\] mix heads of 32 channels; use blocks that divide 32"):
        fold_into_values(weight, None, InputTransform(hadamard_block=64), heads=2)
    swapped = torch.arange(WIDTH).flip(0).to(torch.int32)
    with pytest.raises(ShapeError, match="the permutation moves channels between heads"):
        fold_into_values(weight, None, InputTransform(permutation=swapped), heads=2)
    with pytest.raises(ShapeError, match="shift_rows: hold 8 rows for 64 channels"):
        fold_into_modulation_rows(
            normal(72, 4), None, torch.ones(64), scale_rows=slice(0, 64), shift_rows=slice(64, 72)
        )
