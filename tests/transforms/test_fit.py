"""Every transform is exact before quantization, and fitted as its recipe says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trdq_core.errors import RecipeError, ShapeError
from trdq_core.kernels import dispatch
from trdq_core.kernels.types import InputStages
from trdq_core.numerics.affine import fake_quantize_tokens
from trdq_core.presets import METHODS, make_recipe
from trdq_core.specs import TransformSpec
from trdq_core.transforms.base import InputTransform, aligned
from trdq_core.transforms.fit import fit_transform
from trdq_core.transforms.smoothing import CANDIDATES, Smoothing, smooth_scale

SMOOTH = TransformSpec(kind="smooth", alpha=0.11)
GREEDY = TransformSpec(kind="greedy_rotation", steps=64)
SERPENTINE = TransformSpec(kind="serpentine")
HADAMARD = TransformSpec(kind="hadamard")
SIGNED = TransformSpec(kind="hadamard", random_signs=True)
ADAPTIVE = TransformSpec(kind="adaptive_rotation", random_signs=True)
CHAINS: dict[str, tuple[TransformSpec, ...]] = {
    "smooth": (SMOOTH,),
    "searched": (TransformSpec(kind="smooth", alpha=None), HADAMARD),
    "searched before greedy": (TransformSpec(kind="smooth", alpha=None), GREEDY, SERPENTINE, GREEDY),
    "greedy": (GREEDY,),
    "tr-dq": (SMOOTH, GREEDY, SERPENTINE, GREEDY),
    "signs alone": (SIGNED,),
    "signs and scale": (SMOOTH, SIGNED),
    "serpentine and signs": (SMOOTH, SERPENTINE, SIGNED),
    "signs behind a rotation": (SMOOTH, GREEDY, SERPENTINE, SIGNED, GREEDY),
    "adaptive, rough": (SMOOTH, ADAPTIVE),
    "adaptive, calm": (SMOOTH, TransformSpec(kind="adaptive_rotation", threshold=1e9)),
    **{name: make_recipe(name).rules[0].transforms for name in METHODS if name != "fp"},
}


def bed(tokens: int = 256, channels: int = 256) -> tuple[Tensor, Tensor]:
    """Activations with outlier channels and one spike, and heavy-tailed weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator)
    x[:, torch.randperm(channels, generator=generator)[:6]] *= torch.linspace(20, 60, 6)
    x[3, 7] = 245.0
    weight = torch.randn(512, channels, generator=generator).pow(3) * 0.02
    return x, weight


def error_of(x: Tensor, weight: Tensor) -> Callable[[InputTransform], float]:
    """The squared output error of a 4-bit grid for each token and each output, of some of them, with a transform."""
    x, weight = x[:64], weight[:64]

    def error(transform: InputTransform) -> float:
        seen = fake_quantize_tokens(transform.apply(x), bits=4, symmetric=False)
        rows = fake_quantize_tokens(transform.apply_to_weight(weight).float(), bits=4, symmetric=False)
        return float((seen @ rows.T - x @ weight.T).square().sum())

    return error


def fit(name: str, x: Tensor, weight: Tensor, seed: int = 0) -> InputTransform:
    return fit_transform(
        CHAINS[name], rows=x, absmax=x.abs().amax(0), weights=[weight], seed=seed, output_error=error_of(x, weight)
    )


@pytest.mark.parametrize("chain", CHAINS)
def test_invariant_04_the_output_is_unchanged_before_quantization(chain: str) -> None:
    x, weight = bed()
    fitted = fit(chain, x, weight)
    exact = x.double() @ weight.double().T
    in_double = fitted.apply(x.double()) @ fitted.apply_to_weight(weight).T
    in_single = fitted.apply(x) @ fitted.apply_to_weight(weight).float().T
    assert (in_double - exact).abs().max() <= 1e-10 * exact.abs().max()
    assert (in_single.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("chain", ["greedy", "tr-dq", "vidit-q", "signs behind a rotation"])
def test_invariant_05_rotations_keep_the_length_of_every_token(chain: str) -> None:
    x, weight = bed()
    fitted = fit(chain, x, weight)
    scaled = x.double() * (1 if fitted.inverse_scale is None else fitted.inverse_scale.double())
    ratio = fitted.apply(x.double()).norm(dim=1) / scaled.norm(dim=1)
    # Dense rotations are stored in fp16 and counter-rotated by their true inverse, so lengths hold to fp16 only.
    assert (ratio - 1).abs().max() <= (1e-5 if fitted.rotation is None else 2e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_invariant_07_smoothing_balances_as_alpha_says(alpha: float) -> None:
    x, weight = bed()
    a, w = x.abs().amax(0), weight.abs().amax(0)
    scale = smooth_scale(a, w, alpha)
    x_range, w_range = a / scale, w * scale
    if alpha == 0:
        assert torch.allclose(w_range, torch.ones_like(w_range), rtol=1e-5)
    elif alpha == 1:
        assert torch.allclose(x_range, torch.ones_like(x_range), rtol=1e-5)
    else:
        assert torch.allclose(x_range, w_range, rtol=1e-5)


@pytest.mark.parametrize("chain", CHAINS)
def test_invariant_09_dead_channels_stay_finite_and_exact(chain: str) -> None:
    x, weight = bed()
    x[:, 11], weight[:, 12] = 0, 0
    fitted = fit(chain, x, weight)
    transformed = fitted.apply(x.double()) @ fitted.apply_to_weight(weight).T
    assert torch.isfinite(transformed).all()
    assert torch.allclose(transformed, x.double() @ weight.double().T, rtol=1e-8, atol=1e-8)


def test_invariant_10_a_stored_transform_gives_the_same_bits(tmp_path: Path) -> None:
    x, weight = bed()
    fitted = fit("signs behind a rotation", x, weight)
    tensors = {name: part for name, part in fitted._asdict().items() if isinstance(part, Tensor)}
    save_file(tensors, tmp_path / "transform.safetensors")
    loaded = fitted._replace(**load_file(tmp_path / "transform.safetensors"))
    assert loaded.permutation is not None and loaded.permutation.dtype == torch.int32
    assert torch.equal(loaded.apply(x), fitted.apply(x))
    assert torch.equal(loaded.apply_to_weight(weight), fitted.apply_to_weight(weight))


def test_random_signs_need_no_kernel_of_their_own() -> None:
    x, weight = bed()
    plain, signed = fit("vidit-q", x, weight), fit("signs and scale", x, weight)
    assert signed.inverse_scale is not None and plain.hadamard_block == signed.hadamard_block == 128
    assert 0.3 < float((signed.inverse_scale < 0).float().mean()) < 0.7
    assert torch.equal(fit("signs alone", x, weight).inverse_scale.abs(), torch.ones(256))
    assert fit("signs and scale", x, weight, seed=1).inverse_scale.sign().ne(signed.inverse_scale.sign()).any()


def test_random_signs_run_in_the_kernels_as_they_are() -> None:
    x, weight = bed()
    fitted = fit("serpentine and signs", x, weight)
    stages = InputStages(*fitted)
    backends = (dispatch.select_backend(torch.device("cpu")), "reference")
    fast, slow = (dispatch.quantize_activation(x, stages, 8, False, None, backend=backend) for backend in backends)
    expected = fitted.apply(x)
    for result in (fast, slow):
        values = (result.values.float() - result.zero_point[:, None]) * result.scale[:, None]
        assert (values - expected).abs().max() <= 0.51 * result.scale.max()


def test_a_searched_scale_is_no_worse_than_any_candidate() -> None:
    x, weight = bed()
    error = error_of(x, weight)
    absmax, weight_absmax = x.abs().amax(0), weight.abs().amax(0)
    best = error(fit("searched", x, weight))
    assert len(CANDIDATES) == 39
    for candidate in CANDIDATES:
        scale = candidate.scale(absmax, weight_absmax)
        inverse = None if scale is None else (1 / scale).float()
        assert best <= error(InputTransform(inverse_scale=inverse, hadamard_block=128))


def test_a_search_may_leave_the_scale_out() -> None:
    x, weight = bed()
    chain = CHAINS["searched"]
    arguments = {"rows": x, "absmax": x.abs().amax(0), "weights": [weight], "seed": 0}
    fitted = fit_transform(chain, **arguments, output_error=lambda t: 0.0 if t.inverse_scale is None else 1.0)
    assert fitted == InputTransform(hadamard_block=128)
    with pytest.raises(RecipeError, match="ff: smooth without alpha is searched by the output error; give alpha here"):
        fit_transform(chain, **arguments, layer="ff")


def test_a_search_done_before_is_taken_over() -> None:
    x, weight = bed()
    chain = CHAINS["searched"]
    arguments = {"rows": x, "weights": [weight], "seed": 0, "smoothing": Smoothing(0.35, with_weights=False)}
    for absmax in (x.abs().amax(0), x.abs().amax(0) * 3):
        fitted = fit_transform(chain, absmax=absmax, **arguments)
        assert torch.equal(fitted.inverse_scale, (1 / smooth_scale(absmax, None, 0.35)).float())


def test_sets_with_and_without_a_scale_are_aligned() -> None:
    scale = torch.tensor([2.0, -0.5])
    with_scale, without = InputTransform(inverse_scale=scale), InputTransform()
    first, second = aligned([without, with_scale])
    assert torch.equal(first.inverse_scale, torch.ones(2)) and second is with_scale
    assert aligned([without, without]) == (without, without)
    with pytest.raises(ShapeError, match="the sets of one input differ in their rotations"):
        aligned([without, InputTransform(hadamard_block=32)])


def test_siblings_share_one_transform_fitted_on_all_their_weights() -> None:
    x, weight = bed()
    arguments = {"rows": x, "absmax": x.abs().amax(0), "seed": 0}
    both = fit_transform((TransformSpec(kind="smooth", alpha=0.5),), weights=[weight, 3 * weight], **arguments)
    largest = fit_transform((TransformSpec(kind="smooth", alpha=0.5),), weights=[3 * weight], **arguments)
    assert torch.equal(both.inverse_scale, largest.inverse_scale)


@pytest.mark.parametrize("chain", ["tr-dq", "signs behind a rotation"])
def test_invariant_38_the_same_seed_gives_the_same_transform(chain: str) -> None:
    x, weight = bed()
    first, second = fit(chain, x, weight), fit(chain, x, weight)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor))


def test_describe_names_the_parts() -> None:
    x, weight = bed()
    words = {name: fit(name, x, weight).describe() for name in ("tr-dq", "signs alone", "signs and scale")}
    assert words == {
        "tr-dq": "scale, R64, permute, R64",
        "signs alone": "signs, H128",
        "signs and scale": "scale, signs, H128",
    }
    assert not fit("tr-dq", x, weight).is_identity
    assert InputTransform().describe() == "none"
    assert InputTransform().is_identity


def test_the_search_prefers_less_smoothing_before_a_rotation() -> None:
    x, weight = bed()
    alone = fit_transform(
        CHAINS["searched"][:1],
        rows=x,
        absmax=x.abs().amax(0),
        weights=[weight],
        seed=0,
        output_error=error_of(x, weight),
    )
    spread = [float(t.inverse_scale.log().std()) for t in (alone, fit("searched", x, weight))]
    assert spread[1] < spread[0] and math.isfinite(spread[0])
