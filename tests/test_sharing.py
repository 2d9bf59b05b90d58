"""Sharing in whole models: what is installed, what it composes with, and that the original is left alone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_pipeline
from trdq_core import branches
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.calibration import calibrate
from trdq_core.convert import convert
from trdq_core.errors import Cancelled, RecipeError
from trdq_core.kernels import dispatch
from trdq_core.metrics import latent_sqnr_db
from trdq_core.passes import ModelPasses
from trdq_core.presets import make_recipe, published_sharing, with_sharing
from trdq_core.sampling import Trajectory, sample
from trdq_core.sharing import apply_sharing, attention_flops, self_attentions, shared_copy
from trdq_core.specs import Recipe, SharingSpec
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeContext, TimeGroups

STEPS = 4
ALL = SharingSpec(blocks=((0, 1),))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def statistics(model: PixArtModel) -> Statistics:
    return calibrate(model, ["red apple"], steps=STEPS, guidance=3.5, seed=0)


def run(model: PixArtModel, denoiser: torch.nn.Module, guidance: float = 3.5, **options: object) -> Trajectory:
    with model.using(denoiser):
        return sample(model, model.encode(["tiger face"])[0], 1, steps=STEPS, guidance=guidance, **options)


def test_the_published_list_scales_with_the_depth() -> None:
    assert published_sharing(28).blocks == ((*range(8), *range(22, 28)),)
    assert published_sharing(12).blocks == ((0, 1, 2, 9, 10, 11),)
    assert published_sharing(2).active


def test_sharing_is_part_of_a_recipe_and_of_its_json() -> None:
    recipe = with_sharing(make_recipe("rtn"), SharingSpec(blocks=((0,), (0, 3)), edges=(500.0,)))
    assert recipe.name == "rtn-w8a8+sharing"
    assert Recipe.from_json(recipe.to_json()) == recipe
    old = make_recipe("rtn").to_dict()
    del old["sharing"]
    assert Recipe.from_dict(old) == make_recipe("rtn")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"blocks": [[0]], "edges": [500.0]}, "got 1 lists for 2 time groups"),
        ({"edges": [500.0, 400.0]}, "give rising timesteps between 0 and 1000"),
        ({"blocks": [[-1]]}, "blocks count from 0"),
        ({"threshold": 0.1}, "a measure and its threshold are given together"),
        ({"measure": "taste", "threshold": 0.1}, "got 'taste'; allowed are 'map_cosine', 'output_error'"),
    ],
)
def test_bad_plans_are_refused_in_words(fields: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        SharingSpec.from_dict(fields)


def test_blocks_that_are_not_there_are_named(model: PixArtModel) -> None:
    with pytest.raises(RecipeError, match="got block 2; this model has self-attention in blocks 0 to 1"):
        shared_copy(model.denoiser, model.linears(), SharingSpec(blocks=((2,),)))


def test_invariant_35_no_blocks_and_guidance_one_change_no_bit(model: PixArtModel) -> None:
    for spec, guidance in ((SharingSpec(), 3.5), (ALL, 1.0)):
        denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), spec)
        shared, plain = run(model, denoiser, guidance), run(model, model.denoiser, guidance)
        assert all(torch.equal(a, b) for a, b in zip(shared.latents, plain.latents, strict=True))
        assert sharing.facts()["shared_calls"] == 0


def test_the_error_grows_with_the_number_of_shared_blocks(tmp_path: Path) -> None:
    """Four blocks, one more shared each time: latents move away from the unshared ones with each. The first block is free,
    since the prompt comes in behind it."""
    tiny_pipeline(layers=4).save_pretrained(tmp_path)
    model = PixArtModel(tmp_path)
    exact = run(model, model.denoiser).latents[-1]
    errors = []
    for count in range(5):
        denoiser, _, _ = shared_copy(model.denoiser, model.linears(), SharingSpec(blocks=(tuple(range(count)),)))
        errors.append(float((run(model, denoiser).latents[-1] - exact).norm() / exact.norm()))
    assert errors[0] == 0
    assert errors[1] <= 1e-5
    assert all(b > a for a, b in itertools.pairwise(errors[1:])), errors


def test_the_original_is_untouched_and_the_copy_shares(model: PixArtModel) -> None:
    before = run(model, model.denoiser)
    denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), ALL)
    shared = run(model, denoiser)
    after = run(model, model.denoiser)
    assert torch.equal(before.latents[-1], after.latents[-1])
    assert not torch.equal(before.latents[-1], shared.latents[-1])
    assert sharing.facts()["shared_calls"] == 2 * STEPS
    assert denoiser.proj_out.weight is model.denoiser.proj_out.weight


def test_blocks_follow_the_time_groups(model: PixArtModel) -> None:
    timesteps = run(model, model.denoiser).timesteps
    edge = (timesteps[0] + timesteps[1]) / 2
    denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), SharingSpec(blocks=((), (1,)), edges=(edge,)))
    run(model, denoiser)
    assert (sharing.facts()["shared_calls"], sharing.facts()["plain_calls"]) == (1, STEPS - 1)


def test_equal_prompts_make_sharing_exact(model: PixArtModel) -> None:
    denoiser, _, _ = shared_copy(model.denoiser, model.linears(), ALL)
    conditioning = model.encode(["tiger face"])[0]
    tensors = conditioning.tensors
    same = conditioning._replace(
        tensors={
            **tensors,
            "negative_prompt_embeds": tensors["prompt_embeds"],
            "negative_prompt_attention_mask": tensors["prompt_attention_mask"],
        }
    )
    plain = sample(model, same, 1, steps=STEPS, guidance=3.5)
    with model.using(denoiser):
        shared = sample(model, same, 1, steps=STEPS, guidance=3.5)
    for a, b in zip(shared.latents, plain.latents, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_invariant_35_a_cancelled_run_leaves_nothing_behind(model: PixArtModel) -> None:
    denoiser, _, _ = shared_copy(model.denoiser, model.linears(), ALL)
    whole = run(model, denoiser)

    def cancel(step: int, timestep: float, latents: torch.Tensor) -> None:
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        run(model, denoiser, on_step=cancel)
    assert branches.present().branch == "single"
    assert not branches.present().kept
    assert torch.equal(run(model, denoiser).latents[-1], whole.latents[-1])


@pytest.mark.parametrize(
    ("method", "groups", "storage"),
    [("rtn", 1, None), ("tr-dq", 1, None), ("tr-dq", 2, "resident"), ("tr-dq", 2, "switched"), ("rtn-static", 1, None)],
)
def test_sharing_composes_with_quantization(
    model: PixArtModel, statistics: Statistics, tmp_path: Path, method: str, groups: int, storage: str | None
) -> None:
    recipe = make_recipe(method, groups=groups, storage=storage)
    settings = {"backend": dispatch.select_backend(torch.device("cpu")), "storage_folder": tmp_path}
    if method == "rtn-static":
        settings["passes"] = ModelPasses(ranges=lambda wanted, groups: {name: ((-8.0, 8.0),) for name in wanted})
    inputs = model.denoiser, model.linears()
    shared = convert(*inputs, with_sharing(recipe, ALL), statistics, **settings)
    idle = convert(*inputs, with_sharing(recipe, SharingSpec()), statistics, **settings)
    plain = convert(*inputs, recipe, statistics, **settings)
    full, _, _ = shared_copy(*inputs, ALL)
    runs = {
        name: run(model, d)
        for name, d in (("shared", shared.denoiser), ("idle", idle.denoiser), ("plain", plain.denoiser))
    }
    assert torch.equal(runs["idle"].latents[-1], runs["plain"].latents[-1])
    assert not torch.equal(runs["shared"].latents[-1], runs["plain"].latents[-1])
    if method != "rtn-static":  # the ranges above are made up
        assert min(latent_sqnr_db(runs["shared"], run(model, full))) >= 20, "sharing adds nothing to the rounding error"
    facts = shared.facts()
    assert facts["sharing"]["shared_calls"] == 2 * STEPS
    assert "sharing" not in plain.facts()
    assert facts["weight_bytes"] == plain.facts()["weight_bytes"]


def test_switched_and_resident_storage_share_alike(model: PixArtModel, statistics: Statistics, tmp_path: Path) -> None:
    ends = []
    for storage in ("resident", "switched"):
        recipe = dataclasses.replace(make_recipe("tr-dq", groups=2, storage=storage), sharing=ALL)
        settings = {"backend": dispatch.select_backend(torch.device("cpu")), "storage_folder": tmp_path}
        conversion = convert(model.denoiser, model.linears(), recipe, statistics, **settings)
        ends.append(run(model, conversion.denoiser).latents[-1])
    assert torch.equal(*ends)


@pytest.mark.parametrize("guidance", ["held", "off"])
def test_skipping_halves_the_operations_of_the_late_steps(model: PixArtModel, guidance: str) -> None:
    plain = flops_of_steps(model, model.denoiser)
    timesteps = run(model, model.denoiser).timesteps
    spec = SharingSpec(skip_unconditional_below=timesteps[1] - 0.5, skipped_guidance=guidance)
    denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), spec)
    found = flops_of_steps(model, denoiser)
    assert found[:2] == plain[:2]
    assert [2 * count for count in found[2:]] == plain[2:]
    assert sharing.facts()["skipped_calls"] == STEPS - 2


def test_reuse_leaves_out_the_self_attention_of_every_second_step(model: PixArtModel) -> None:
    plain = flops_of_steps(model, model.denoiser)
    denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), SharingSpec(across_steps=((0, 1),)))
    found = flops_of_steps(model, denoiser)
    whole, _ = attention_flops(16, 128)
    assert [a - b for a, b in zip(plain, found, strict=True)] == [0, 2 * whole, 0, 2 * whole]
    assert (sharing.facts()["reused_calls"], sharing.facts()["computed_calls"]) == (STEPS, STEPS)


def flops_of_steps(model: PixArtModel, denoiser: torch.nn.Module) -> list[int]:
    """Operations of each call of the denoiser in the stock pipeline."""
    counts = []
    counter = FlopCounterMode(display=False)

    def after(*_: object) -> None:
        counts.append(counter.get_total_flops() - sum(counts))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        run(model, denoiser, on_step=after)
    # Scheduler and pipeline multiply no matrices, so all that is counted between two steps is the denoiser's.
    return counts


EVERYTHING = SharingSpec(
    blocks=((0, 1), (0,)), edges=(600.0,), across_steps=((1,), (0, 1)), skip_unconditional_below=400.0
)


def test_runs_of_other_lengths_and_cancelled_ones_leave_no_trace(model: PixArtModel) -> None:
    denoiser, _, _ = shared_copy(model.denoiser, model.linears(), EVERYTHING)
    fresh, _, _ = shared_copy(model.denoiser, model.linears(), EVERYTHING)
    conditioning = model.encode(["tiger face"])[0]

    def cancel(step: int, timestep: float, latents: torch.Tensor) -> None:
        if step == 2:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        run(model, denoiser, on_step=cancel)
    for steps in (7, 2):
        ends = []
        for used in (denoiser, fresh):
            with model.using(used):
                ends.append(sample(model, conditioning, 3, steps=steps, guidance=3.5).latents[-1])
        assert torch.equal(*ends)
        fresh, _, _ = shared_copy(model.denoiser, model.linears(), EVERYTHING)


def test_everything_composes_with_quantization(model: PixArtModel, statistics: Statistics, tmp_path: Path) -> None:
    settings = {"backend": dispatch.select_backend(torch.device("cpu")), "storage_folder": tmp_path}
    recipe = with_sharing(make_recipe("tr-dq"), EVERYTHING)
    conversion = convert(model.denoiser, model.linears(), recipe, statistics, **settings)
    full, _, _ = shared_copy(model.denoiser, model.linears(), EVERYTHING)
    quantized = run(model, conversion.denoiser)
    assert min(latent_sqnr_db(quantized, run(model, full))) >= 20
    facts = conversion.facts()["sharing"]
    assert facts["skipped_calls"] > 0
    assert facts["reused_calls"] > 0
    assert facts["shared_calls"] > 0


def test_guidance_one_reuses_but_skips_nothing(model: PixArtModel) -> None:
    spec = SharingSpec(skip_unconditional_below=1000.0, skipped_guidance="off")
    denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), spec)
    assert torch.equal(run(model, denoiser, 1.0).latents[-1], run(model, model.denoiser, 1.0).latents[-1])
    assert sharing.facts()["skipped_calls"] == 0


def test_the_stock_pipeline_takes_several_and_negative_prompts(model: PixArtModel) -> None:
    pipeline = model.pipeline
    denoiser, _, sharing = shared_copy(model.denoiser, model.linears(), SharingSpec(skip_unconditional_below=600.0))
    settings = {
        "negative_prompt": ["rocket", ""], "num_inference_steps": STEPS, "height": 16, "width": 16,
        "use_resolution_binning": False, "clean_caption": False, "output_type": "latent", "guidance_scale": 3.5,
        "max_sequence_length": 8,
    }  # fmt: skip
    ends = {}
    for name, used in (("plain", model.denoiser), ("skipping", denoiser)):
        with model.using(used), branches.joint():
            latents = torch.cat([model.initial_latents(0), model.initial_latents(1)])
            ends[name] = pipeline(prompt=["red apple", "tiger face"], latents=latents, **settings).images
    assert sharing.facts()["skipped_calls"] > 0
    assert ends["skipping"].shape == ends["plain"].shape
    assert torch.isfinite(ends["skipping"]).all()
    assert not torch.equal(ends["skipping"], ends["plain"])


def test_names_and_operations_of_attention(model: PixArtModel) -> None:
    assert self_attentions(model.linears()) == [f"transformer_blocks.{i}.attn1" for i in range(2)]
    whole, saved = attention_flops(1024, 384)
    assert saved / whole == pytest.approx(0.25)
    sharing = apply_sharing(
        shared_copy(model.denoiser, (), SharingSpec())[0], model.linears(), ALL, TimeContext(TimeGroups())
    )
    assert sorted(sharing.processors) == [0, 1]
