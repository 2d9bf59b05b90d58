"""Attention products in the int8 kernel, asked for by a recipe: what runs, what stays exact, how far it is from exact."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.attention_products import use_int8_attention
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion, convert
from trdq_core.data_free import convert_without_data
from trdq_core.errors import RecipeError
from trdq_core.kernels import dispatch, native
from trdq_core.nn.fused import unfused
from trdq_core.nn.modules import share_copy
from trdq_core.plan import make_plan
from trdq_core.presets import make_recipe, parse_recipe
from trdq_core.sampling import Trajectory, sample
from trdq_core.specs import AttentionSpec
from trdq_core.statistics import Statistics

STEPS = 3
RTN = make_recipe("rtn")


@pytest.fixture(autouse=True)
def _native() -> None:
    reason = native.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def statistics(model: PixArtModel) -> Statistics:
    return calibrate(model, ["red apple"], steps=STEPS, guidance=3.5, seed=0)


def made(model: PixArtModel, attention: AttentionSpec | None, backend: dispatch.Backend = "cpp") -> Conversion:
    recipe = dataclasses.replace(RTN, attention=attention)
    return convert_without_data(share_copy(model.denoiser), model.linears(), recipe, backend=backend)


def run(model: PixArtModel, conversion: Conversion) -> Trajectory:
    with model.using(conversion.denoiser):
        return sample(model, model.encode(["tiger face"])[0], 1, steps=STEPS, guidance=3.5)


def distance(a: Trajectory, b: Trajectory) -> float:
    return float((a.latents[-1] - b.latents[-1]).norm() / b.latents[-1].norm())


def calls(conversion: Conversion) -> int:
    return conversion.facts()["attention"]["calls"]


def test_the_preset_runs_in_the_int8_kernel_and_says_so(
    model: PixArtModel, statistics: Statistics, tmp_path: Path
) -> None:
    """Calibrated as tr-dq is, with time groups; nothing is simulated, and no pass over the model is asked for."""
    recipe = parse_recipe("tr-dq-int8-attention-w8a8", groups=2)
    conversion = convert(model.denoiser, model.linears(), recipe, statistics, backend="cpp", storage_folder=tmp_path)
    facts = conversion.facts()
    assert facts["kernels"] == {dispatch.kernel_name(8, 8, "cpp"): 20, dispatch.int8_attention_name(): 4}
    assert facts["simulated"] is False
    assert facts["attention"] == {
        "attentions": 4, "exact": 0, "bits": 8, "softmax_bits": 8, "softmax_grid": "uniform", "calls": 0,
        "simulated": False,
    }  # fmt: skip
    run(model, conversion)
    assert calls(conversion) == 4 * STEPS
    plain = dataclasses.replace(parse_recipe("tr-dq-w8a8", groups=2), name=recipe.name, description=recipe.description)
    assert dataclasses.replace(recipe, attention=None) == plain


def test_near_the_exact_attention_but_not_equal(model: PixArtModel) -> None:
    """The same linears with and without: what lies between is the rounding of attention operands."""
    exact, int8, own = (
        made(model, spec) for spec in (None, AttentionSpec(live=True), AttentionSpec(live=True, cross=False))
    )
    reference = run(model, exact)
    assert "attention" not in exact.facts()
    assert 0 < distance(run(model, int8), reference) < 0.02
    assert 0 < distance(run(model, own), reference) < 0.02
    assert (calls(int8), calls(own)) == (4 * STEPS, 2 * STEPS)
    assert own.facts()["kernels"][dispatch.int8_attention_name()] == 2


def test_the_default_is_exact() -> None:
    assert not any(
        recipe.attention is not None and recipe.attention.live for recipe in map(make_recipe, ("tr-dq", "tq-dit"))
    )


def test_where_nothing_is_fused_it_is_exact_and_reported_so(model: PixArtModel) -> None:
    """torch's kernels, as on a machine without a compiler; and a fused model while fusion is off."""
    other = made(model, AttentionSpec(live=True), "torch")
    facts = other.facts()
    assert (facts["attention"]["attentions"], facts["attention"]["exact"]) == (0, 4)
    assert list(facts["kernels"]) == [dispatch.kernel_name(8, 8, "torch")]
    same = run(model, made(model, None, "torch"))
    assert torch.equal(run(model, other).latents[-1], same.latents[-1])
    assert calls(other) == 0
    int8 = made(model, AttentionSpec(live=True))
    with unfused():
        run(model, int8)
    assert calls(int8) == 0


def test_too_many_keys_for_integer_sums_stay_exact(model: PixArtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model has more keys than this limit."""
    monkeypatch.setattr("trdq_core.kernels.cpu.MAX_IN_FEATURES", 3)
    exact, int8 = (made(model, spec) for spec in (None, AttentionSpec(live=True)))
    assert torch.equal(run(model, int8).latents[-1], run(model, exact).latents[-1])
    assert calls(int8) == 0


def test_plans_say_where_it_runs(model: PixArtModel) -> None:
    for attention, live, simulated in ((AttentionSpec(live=True), True, False), (AttentionSpec(), False, True)):
        notes = make_plan(model.linears(), dataclasses.replace(RTN, attention=attention), backend="cpp").notes
        assert any(note.startswith("Attention products are int8") for note in notes) is live
        assert any(note.startswith("Simulated") for note in notes) is simulated


def test_a_model_without_attention_is_refused(model: PixArtModel) -> None:
    with pytest.raises(RecipeError, match="no attention whose products"):
        use_int8_attention(model.denoiser, [], AttentionSpec(live=True))
