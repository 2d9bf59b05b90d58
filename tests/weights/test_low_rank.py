"""Invariant 27: the low-rank branch of SVDQuant."""

from __future__ import annotations

import pytest
import torch

from trdq_core.errors import CalibrationError, ShapeError
from trdq_core.specs import LowRankSpec, QuantSpec
from trdq_core.weights.low_rank import LowRankFit, fit_low_rank, low_rank_factors
from trdq_core.weights.rounding import dequantize_weight

SPEC = QuantSpec(bits=4, granularity="group", group_size=32)


def case(out_features: int = 96, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose columns are of very different size, as smoothing leaves them, and inputs (300, width)."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(width, generator=generator).exp()
    weight = torch.randn(out_features, width, generator=generator) * 0.03 * columns
    return weight, torch.randn(300, width, generator=generator) / columns.sqrt()


def output_error(fit: LowRankFit, weights: list[torch.Tensor], inputs: torch.Tensor) -> float:
    return sum(
        float(
            (inputs.double() @ (up.double() @ fit.down.double() + dequantize_weight(q) - w.double()).T).square().sum()
        )
        for up, q, w in zip(fit.ups, fit.weights, weights, strict=True)
    )


def test_invariant_27_the_residual_falls_with_the_rank_to_zero() -> None:
    weight, _ = case()
    sizes = []
    for rank in (1, 4, 16, 48, 96):
        down, up = low_rank_factors(weight, rank)
        sizes.append(float((weight.double() - up @ down).norm()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 1e-10 * weight.norm()


def test_invariant_27_the_randomised_svd_is_within_one_percent_of_the_exact() -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))  # no decay: the hardest case
    for rank in (8, 32):
        down, up = low_rank_factors(weight, rank, seed=3)
        exact = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
        assert (weight.double() - up @ down).norm() <= 1.01 * exact
        assert torch.equal(low_rank_factors(weight, rank, seed=3)[0], down)


def test_invariant_27_the_kept_error_never_grows_and_is_at_most_that_without_a_branch() -> None:
    weight, inputs = case()
    errors = []
    for iterations in (1, 2, 4, 10):
        fit = fit_low_rank([weight], SPEC, LowRankSpec(rank=16, iterations=iterations), inputs=inputs)
        assert fit.error == pytest.approx(output_error(fit, [weight], inputs), rel=1e-9)
        errors.append(fit.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.8 * fit.error_without


def test_invariant_27_a_branch_that_hurts_is_not_kept() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-7, 8, (64, 64), generator=generator).float()
    weight[:, 0] = 7  # every row lies on its grid already
    fit = fit_low_rank(
        [weight], QuantSpec(bits=4), LowRankSpec(rank=4), inputs=torch.randn(50, 64, generator=generator)
    )
    assert fit.error_without <= 1e-9
    assert (fit.iteration, fit.error) == (0, fit.error_without)
    assert fit.down.abs().max() == 0


def test_weights_that_read_one_tensor_share_a_down_projection() -> None:
    weight, inputs = case()
    parts = list(weight.split((32, 24, 40)))
    fit = fit_low_rank(parts, SPEC, LowRankSpec(rank=8), inputs=inputs)
    assert fit.down.shape == (8, 128)
    assert [tuple(up.shape) for up in fit.ups] == [(32, 8), (24, 8), (40, 8)]
    assert fit.down.dtype is torch.float32
    assert fit.error == pytest.approx(output_error(fit, parts, inputs), rel=1e-9)
    assert fit.error < fit.error_without


def test_gptq_rounds_the_residual() -> None:
    weight, inputs = case()
    nearest, learned = (
        fit_low_rank([weight], SPEC, LowRankSpec(rank=8, iterations=2), inputs=inputs, rounding=rounding)
        for rounding in ("nearest", "gptq")
    )
    assert learned.error < nearest.error


def test_missing_or_unequal_inputs_are_one_sentence() -> None:
    weight, inputs = case()
    with pytest.raises(CalibrationError, match=r"blocks\.0\.qkv: a low-rank branch .* needs sampled inputs"):
        fit_low_rank([weight], SPEC, LowRankSpec(), inputs=None, layer="blocks.0.qkv")
    with pytest.raises(ShapeError, match="widths 64, 128"):
        fit_low_rank([weight, weight[:, :64]], SPEC, LowRankSpec(), inputs=inputs)
    with pytest.raises(CalibrationError, match="NaN"):
        fit_low_rank([weight], SPEC, LowRankSpec(), inputs=inputs * float("nan"))


def few_directions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, 200 rows that move in 12 directions, and rows that move in others: what a few texts do to a layer."""
    generator = torch.Generator().manual_seed(3)
    seen, other = (
        torch.randn(200, 12, generator=generator) @ torch.randn(12, 128, generator=generator) for _ in range(2)
    )
    weight, _ = case()
    return weight, seen, other


def test_rows_of_other_prompts_choose_the_damping() -> None:
    weight, seen, other = few_directions()
    bent, held = (
        fit_low_rank([weight], SPEC, LowRankSpec(rank=8), inputs=seen, held_out=rows, rounding="gptq")
        for rows in (None, other)
    )
    assert output_error(held, [weight], other) < 0.7 * output_error(bent, [weight], other)
    assert output_error(bent, [weight], seen) < output_error(held, [weight], seen)


def test_a_refit_branch_is_better_for_the_inputs_and_never_worse_on_held_out_rows() -> None:
    weight, inputs = case()
    fit_on, held_out = inputs[:200], inputs[200:]
    errors = [
        output_error(
            fit_low_rank(
                [weight], SPEC, LowRankSpec(rank=8, refit=refit), inputs=fit_on, held_out=held_out, rounding="gptq"
            ),
            [weight],
            held_out,
        )
        for refit in (False, True)
    ]
    assert errors[1] < errors[0]

    weight, seen, other = few_directions()
    plain, refitted = (
        fit_low_rank([weight], SPEC, LowRankSpec(rank=8, refit=refit), inputs=seen, held_out=other)
        for refit in (False, True)
    )
    assert output_error(refitted, [weight], other) <= output_error(plain, [weight], other)
