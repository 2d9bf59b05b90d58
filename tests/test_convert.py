"""Plans, fits and conversions on a tiny stock PixArt."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.calibration import calibrate, observe_ranges
from trdq_core.convert import Conversion, convert
from trdq_core.errors import CalibrationError, Cancelled, RecipeError, ShapeError
from trdq_core.kernels import dispatch
from trdq_core.metrics import latent_sqnr_db
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.passes import ModelPasses
from trdq_core.plan import LayerInfo, make_plan
from trdq_core.presets import make_recipe
from trdq_core.sampling import Trajectory, sample
from trdq_core.specs import LowRankSpec, Recipe
from trdq_core.statistics import Statistics

STEPS = 6
BACKEND = dispatch.select_backend(torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def statistics(model: PixArtModel) -> Statistics:
    return calibrate(model, ["red apple", "green salad"], steps=STEPS, guidance=3.5, seed=0)


@pytest.fixture
def make(model: PixArtModel, statistics: Statistics, tmp_path: Path) -> object:
    def build(recipe: Recipe, **options: object) -> Conversion:
        settings = {"backend": BACKEND, "storage_folder": tmp_path, **options}
        return convert(model.denoiser, model.linears(), recipe, statistics, **settings)

    return build


def run(model: PixArtModel, denoiser: torch.nn.Module, steps: int = STEPS) -> Trajectory:
    with model.using(denoiser):
        return sample(model, model.encode(["tiger face"])[0], 1, steps=steps, guidance=3.5)


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "vidit-q", "tr-dq"])
def test_w8a8_follows_the_reference_closely(model: PixArtModel, make: object, method: str) -> None:
    reference = run(model, model.denoiser)
    conversion = make(make_recipe(method, groups=2))
    assert min(latent_sqnr_db(run(model, conversion.denoiser), reference)) >= 25
    assert len(conversion.quantized_layers()) == 20
    assert conversion.facts()["kernels"] == {dispatch.kernel_name(8, 8, BACKEND): 20}


def test_the_original_is_untouched(model: PixArtModel, make: object) -> None:
    before = run(model, model.denoiser)
    run(model, make(make_recipe("tr-dq", weight_bits=4, groups=2)).denoiser)
    assert not any(isinstance(m, QuantizedLinear) for m in model.denoiser.modules())
    after = run(model, model.denoiser)
    assert torch.equal(before.latents[-1], after.latents[-1])
    assert not model.denoiser._forward_pre_hooks


def test_switched_and_resident_storage_give_the_same_bits(model: PixArtModel, make: object) -> None:
    recipes = [make_recipe("tr-dq", weight_bits=4, groups=3, storage=s) for s in ("switched", "resident", "shared")]
    recipes = [dataclasses.replace(recipe, do_no_harm=False) for recipe in recipes]
    switched, resident, shared = (make(recipe) for recipe in recipes)
    a, b, c = (run(model, conversion.denoiser) for conversion in (switched, resident, shared))
    assert torch.equal(a.latents[-1], b.latents[-1])
    assert not torch.equal(a.latents[-1], c.latents[-1])
    facts = [conversion.facts() for conversion in (switched, resident, shared)]
    assert facts[0]["weight_bytes"] == facts[2]["weight_bytes"]
    assert facts[1]["weight_bytes"] == 3 * facts[0]["weight_bytes"]
    assert facts[0]["disk_bytes"] >= 3 * facts[0]["weight_bytes"]
    assert facts[2]["disk_bytes"] == 0


def test_invariant_32_one_group_equals_no_groups_bit_for_bit(model: PixArtModel, make: object) -> None:
    one = make_recipe("tr-dq", weight_bits=4, groups=1, storage="resident")
    a = run(model, make(dataclasses.replace(one, storage="resident")).denoiser)
    b = run(model, make(dataclasses.replace(one, storage="shared")).denoiser)
    assert torch.equal(a.latents[-1], b.latents[-1])


def test_a_short_calibration_serves_a_longer_run(model: PixArtModel, make: object) -> None:
    conversion = make(make_recipe("tr-dq", groups=3))
    with pytest.warns(UserWarning, match="outside the calibrated range"):  # eleven steps reach lower than six
        assert len(run(model, conversion.denoiser, steps=11).latents) == 11


def test_invariant_26_do_no_harm_keeps_no_transform_that_raises_the_error(make: object) -> None:
    recipe = make_recipe("smoothquant", weight_bits=4, activation_bits=4)
    gated = make(recipe)
    for fitted in gated.fitted:
        assert fitted.kept == (fitted.error_with <= fitted.error_without)
    free = make(dataclasses.replace(recipe, do_no_harm=False))
    assert all(fitted.kept for fitted in free.fitted)
    assert not free.facts()["rejected"]


def test_invariant_37_reported_bytes_are_those_of_the_buffers(model: PixArtModel, make: object) -> None:
    conversion = make(dataclasses.replace(make_recipe("tr-dq", weight_bits=4), do_no_harm=False))
    counted = 0
    for name, buffer in conversion.denoiser.named_buffers():
        parent = conversion.denoiser.get_submodule(name.rpartition(".")[0])
        if type(parent).__name__ in ("QuantizedLinear", "InputQuantizer") and not name.endswith(".bias"):
            counted += buffer.nbytes
    facts = conversion.facts()
    assert facts["weight_bytes"] == counted
    assert facts["effective_bits"] == pytest.approx(32 * counted / facts["fp_weight_bytes"])


@pytest.mark.parametrize("method", ["rtn", "vidit-q", "tr-dq"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_plan_foretells_the_bytes(model: PixArtModel, make: object, method: str, bits: int) -> None:
    recipe = dataclasses.replace(make_recipe(method, weight_bits=bits), do_no_harm=False)
    plan = make_plan(model.linears(), recipe, backend=BACKEND)
    facts = make(recipe).facts()
    assert plan.weight_bytes == facts["weight_bytes"]
    assert plan.fp_bytes == facts["fp_weight_bytes"]
    kept = {row.role for row in plan.layers if row.action == "keep"}
    assert kept == {"embed", "modulation", "final"}
    assert all(row.reason for row in plan.layers if row.action == "keep")


def test_plans_refuse_what_cannot_be(model: PixArtModel) -> None:
    recipe = make_recipe("tr-dq")
    nothing = dataclasses.replace(recipe, rules=(dataclasses.replace(recipe.rules[0], match="nowhere.*"),))
    with pytest.raises(RecipeError, match="no linear of this model matches a rule"):
        make_plan(model.linears(), nothing, backend=BACKEND)
    rule = recipe.rules[0]
    blocks = tuple(dataclasses.replace(t, block=256) for t in rule.transforms)
    wide = dataclasses.replace(recipe, rules=(dataclasses.replace(rule, transforms=blocks),))
    with pytest.raises(ShapeError, match=r"transformer_blocks\.0\.attn1\.to_q: block=256 does not divide 128 channels"):
        make_plan(model.linears(), wide, backend=BACKEND)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("q-dit", r"transformer_blocks\.0\.attn1\.to_q: weight group_size=96 does not divide in_features=128"),
        ("svdquant", r"transformer_blocks\.0\.attn1\.to_q: weight group_size=96 does not divide in_features=128"),
    ],
)
def test_group_sizes_that_do_not_divide_a_width_are_refused(model: PixArtModel, method: str, words: str) -> None:
    recipe = make_recipe(method, weight_bits=4, activation_bits=4)
    rule = recipe.rules[0]
    odd = {name: dataclasses.replace(getattr(rule, name), group_size=96) for name in ("weight", "activation")}
    with pytest.raises(ShapeError, match=words):
        make_plan(
            model.linears(), dataclasses.replace(recipe, rules=(dataclasses.replace(rule, **odd),)), backend=BACKEND
        )


@pytest.mark.parametrize("width", [72, 144])
def test_group_sizes_that_would_do_are_listed(width: int) -> None:
    layer = LayerInfo("blocks.0.q", "self_q", "blocks.0.q", width, width)
    with pytest.raises(ShapeError, match=r"blocks\.0\.q: weight group_size=64 does not divide .* use one of") as caught:
        make_plan([layer], make_recipe("svdquant", weight_bits=4, activation_bits=4), backend=BACKEND)
    offered = [int(word) for word in re.findall(r"\d+", str(caught.value).partition("use one of")[2])]
    assert offered
    assert all(width % size == 0 for size in offered)


def test_a_rank_beyond_the_weight_is_refused(model: PixArtModel, make: object) -> None:
    recipe = make_recipe("svdquant", weight_bits=4, activation_bits=4)
    deep = (dataclasses.replace(recipe.rules[0], low_rank=LowRankSpec(rank=129)),)
    words = r"transformer_blocks\.0\.attn1\.to_q: low_rank rank=129 is more than the 128 that its weight of 128 channels has"
    with pytest.raises(ShapeError, match=words):
        make_plan(model.linears(), dataclasses.replace(recipe, rules=deep), backend=BACKEND)
    with pytest.raises(ShapeError, match=words):
        make(dataclasses.replace(recipe, rules=deep))


@pytest.mark.parametrize("which", ["weight", "activation"])
def test_a_fit_names_the_layer_that_a_group_size_does_not_fit(make: object, which: str) -> None:
    recipe = make_recipe("q-dit", weight_bits=4, activation_bits=4)
    odd = dataclasses.replace(
        recipe.rules[0], **{which: dataclasses.replace(getattr(recipe.rules[0], which), group_size=96)}
    )
    with pytest.raises(ShapeError, match=rf"transformer_blocks\.0\.attn1\.to_q: {which} group_size=96"):
        make(dataclasses.replace(recipe, rules=(odd,)))


def test_damaged_weights_are_named(model: PixArtModel, make: object) -> None:
    weight = model.denoiser.transformer_blocks[1].ff.net[2].weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(CalibrationError, match=r"transformer_blocks\.1\.ff\.net\.2: its weight holds NaN"):
            make(make_recipe("rtn"))
        with pytest.raises(CalibrationError, match="its input is not finite at timestep"):
            calibrate(model, ["red apple"], steps=2, guidance=3.5, seed=0)
    finally:
        with torch.no_grad():
            weight[0, 0] = kept


def test_cancelling_stops_within_two_steps_and_leaves_no_hooks(model: PixArtModel, make: object) -> None:
    events: list[dict] = []
    with pytest.raises(Cancelled, match="Cancelled during calibrate"):
        calibrate(
            model, ["red apple"], steps=STEPS, guidance=3.5, seed=0,
            on_event=events.append, cancelled=lambda: len(events) >= 2,
        )  # fmt: skip
    assert len(events) <= 3
    assert not model.denoiser._forward_pre_hooks
    with pytest.raises(Cancelled, match="Cancelled during fit"):
        make(make_recipe("rtn"), cancelled=lambda: True)


def test_invariant_38_calibration_and_fit_are_deterministic(
    model: PixArtModel, statistics: Statistics, make: object
) -> None:
    again = calibrate(model, ["red apple", "green salad"], steps=STEPS, guidance=3.5, seed=0)
    for name, layer in statistics.layers.items():
        assert torch.equal(again.layer(name).rows, layer.rows)
    recipe = make_recipe("tr-dq", weight_bits=4, groups=2)
    a, b = (run(model, make(recipe).denoiser) for _ in range(2))
    assert torch.equal(a.latents[-1], b.latents[-1])


def test_statistics_keep_each_timestep_apart(statistics: Statistics) -> None:
    assert len(statistics.timesteps) == STEPS
    layer = statistics.layer("transformer_blocks.0.attn1.to_q")
    assert layer.rows.shape == (STEPS, 32, 128)
    assert layer.item_absmax.shape == (STEPS, 4, 128)  # two prompts, two guidance branches
    absmax = layer.absmax_over_time()
    assert not torch.allclose(absmax[0], absmax[-1], rtol=0.05)


def test_a_cancelled_calibration_goes_on_where_it_was(
    model: PixArtModel, statistics: Statistics, tmp_path: Path
) -> None:
    prompts, partial = ["red apple", "green salad"], tmp_path / "partial"
    settings = {"steps": STEPS, "guidance": 3.5, "seed": 0, "partial": partial}
    events: list[dict] = []
    with pytest.raises(Cancelled):
        calibrate(model, prompts, **settings, on_event=events.append, cancelled=lambda: len(events) > STEPS + 1)
    assert partial.is_dir()
    resumed: list[dict] = []
    again = calibrate(model, prompts, **settings, on_event=resumed.append)
    assert [event["done"] for event in resumed] == list(range(STEPS + 1, 2 * STEPS + 1))
    assert not partial.exists()
    for name, layer in statistics.layers.items():
        assert torch.equal(again.layer(name).rows, layer.rows)
        assert torch.equal(again.layer(name).item_absmax, layer.item_absmax)


def test_static_ranges_come_from_a_second_pass_through_the_transforms(
    model: PixArtModel, statistics: Statistics, make: object
) -> None:
    static = make_recipe("rtn-static")
    with pytest.raises(CalibrationError, match="static activation ranges need a second calibration pass"):
        make(static)
    rotated = make_recipe("tr-dq", groups=2, storage="resident").rules[0]
    activation = static.rules[0].activation
    recipe = dataclasses.replace(
        make_recipe("tr-dq", groups=2, storage="resident"),
        rules=(dataclasses.replace(rotated, activation=activation),),
        do_no_harm=False,
    )

    passes = ModelPasses(ranges=lambda requests, groups: observe_ranges(model, statistics, requests, groups))
    conversion = make(recipe, passes=passes)
    quantizer = conversion.quantized_layers()["transformer_blocks.0.attn1.to_q"].input_quantizer
    assert quantizer.static_scale.shape == (2, 1)
    assert not torch.equal(quantizer.static_scale[0], quantizer.static_scale[1])
    reference = run(model, model.denoiser)
    assert min(latent_sqnr_db(run(model, conversion.denoiser), reference)) >= 20
    plain = make(static, passes=passes)
    dynamic = make(make_recipe("rtn"))
    errors = [latent_sqnr_db(run(model, c.denoiser), reference)[-1] for c in (plain, dynamic)]
    assert errors[0] < errors[1], "one range for all tokens and timesteps must cost something"
