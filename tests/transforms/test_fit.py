"""Invariants 4, 5, 7, 9 and 26: every transform is exact, and rotations really lower the error on outliers."""

from __future__ import annotations

import math

import pytest
import torch

from trdq_core.numerics.affine import fake_quantize_tokens
from trdq_core.presets import METHODS, make_recipe
from trdq_core.specs import TransformSpec
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.fit import fit_transform, smooth_scale

METHOD_NAMES = [name for name in METHODS if name != "fp"]


def bed(tokens: int = 256, channels: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with outlier channels and one spike, and heavy-tailed weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator)
    x[:, torch.randperm(channels, generator=generator)[:6]] *= torch.linspace(20, 60, 6)
    x[3, 7] = 245.0
    weight = torch.distributions.StudentT(4.0).sample((512, channels)) * 0.02
    return x, weight


def fit(method: str, x: torch.Tensor, weight: torch.Tensor) -> InputTransform:
    transforms = make_recipe(method, weight_bits=4, activation_bits=4).rules[-1].transforms

    def error(candidate: InputTransform) -> float:
        seen = fake_quantize_tokens(candidate.apply(x), bits=4, symmetric=False)
        return float((seen @ candidate.apply_to_weight(weight).float().T - x @ weight.T).square().sum())

    absmax = x.abs().amax(0)
    return fit_transform(transforms, rows=x, absmax=absmax, weights=[weight], seed=0, output_error=error)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_004_the_output_is_unchanged_before_quantization(method: str) -> None:
    x, weight = bed()
    fitted = fit(method, x, weight)
    exact = x.double() @ weight.double().T
    in_double = fitted.apply(x.double()) @ fitted.apply_to_weight(weight).T
    in_single = fitted.apply(x) @ fitted.apply_to_weight(weight).float().T
    assert (in_double - exact).abs().max() <= 1e-10 * exact.abs().max()
    assert (in_single.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("method", ["vidit-q", "tr-dq"])
def test_005_rotations_keep_the_length_of_every_token(method: str) -> None:
    x, weight = bed()
    fitted = fit(method, x, weight)
    scaled = x.double() * fitted.inverse_scale.double()
    ratio = fitted.apply(x.double()).norm(dim=1) / scaled.norm(dim=1)
    # Dense rotations are stored in fp16 and counter-rotated by their true inverse, so lengths hold to fp16 only.
    assert (ratio - 1).abs().max() <= (1e-5 if method == "vidit-q" else 2e-3)


def test_007_smoothing_balances_as_alpha_says() -> None:
    x, weight = bed()
    a, w = x.abs().amax(0), weight.abs().amax(0)
    for alpha in (0.0, 0.5, 1.0):
        scale = smooth_scale(a, w, alpha)
        x_range, w_range = a / scale, w * scale
        if alpha == 0:
            assert torch.allclose(w_range, torch.ones_like(w_range), rtol=1e-5)
        elif alpha == 1:
            assert torch.allclose(x_range, torch.ones_like(x_range), rtol=1e-5)
        else:
            assert torch.allclose(x_range, w_range, rtol=1e-5)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_009_dead_channels_stay_finite_and_exact(method: str) -> None:
    x, weight = bed()
    x[:, 11], weight[:, 12] = 0, 0
    fitted = fit(method, x, weight)
    transformed = fitted.apply(x.double()) @ fitted.apply_to_weight(weight).T
    assert torch.isfinite(transformed).all()
    assert torch.allclose(transformed, x.double() @ weight.double().T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["vidit-q", "tr-dq"])
def test_026_rotation_recipes_halve_the_error_on_outliers(method: str) -> None:
    x, weight = bed(512, 1152)

    def error(fitted: InputTransform) -> float:
        y = fitted.apply(x)
        return float((fake_quantize_tokens(y, bits=4, symmetric=False) - y).square().sum() / y.square().sum())

    gain = 10 * math.log10(error(InputTransform()) / error(fit(method, x, weight)))
    assert gain >= 5  # measured 5.4 and 5.3 dB on this bed


def test_siblings_share_one_transform_fitted_on_all_their_weights() -> None:
    x, weight = bed()
    specs = (TransformSpec(kind="smooth", alpha=0.5),)
    absmax = x.abs().amax(0)
    both = fit_transform(specs, rows=x, absmax=absmax, weights=[weight, 3 * weight], seed=0)
    largest = fit_transform(specs, rows=x, absmax=absmax, weights=[3 * weight], seed=0)
    assert torch.equal(both.inverse_scale, largest.inverse_scale)


def test_038_the_same_seed_gives_the_same_transform() -> None:
    x, weight = bed()
    first, second = fit("tr-dq", x, weight), fit("tr-dq", x, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor))


def test_describe_names_the_parts() -> None:
    x, weight = bed()
    assert fit("tr-dq", x, weight).describe() == "scale, R64, permute, R64"
    assert not fit("tr-dq", x, weight).is_identity
    assert InputTransform().describe() == "none"
    assert InputTransform().is_identity
