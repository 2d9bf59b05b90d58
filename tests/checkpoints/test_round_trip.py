"""What was saved comes back from diffusers' own functions to the last bit, with the same bytes and the same kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints.conftest import Convert, reload
from trdq_core.adapters.saving import Saved
from trdq_core.presets import make_recipe, parse_recipe, with_sharing
from trdq_core.specs import LowRankSpec, Recipe, SharingSpec

SHARING = SharingSpec(blocks=((), (0,)), edges=(500.0,), across_steps=((0,), ()), skip_unconditional_below=200.0)


def grouped(storage: str) -> Recipe:
    recipe = make_recipe("tr-dq", weight_bits=4, groups=2, storage=storage)
    return dataclasses.replace(recipe, do_no_harm=False)


def quick(recipe: Recipe) -> Recipe:
    """The recipe with hardly any work in what it iterates."""
    short = recipe.reconstruction and dataclasses.replace(recipe.reconstruction, iterations=2)
    rules = tuple(
        dataclasses.replace(rule, low_rank=rule.low_rank and LowRankSpec(rank=4, iterations=1), alternatives=())
        for rule in recipe.rules
    )
    return dataclasses.replace(recipe, reconstruction=short, rules=rules)


RECIPES = {
    "rtn-w8a8": parse_recipe("rtn-w8a8"),
    "rtn-w3a4": parse_recipe("rtn-w3a4"),
    "rtn-static-w8a8": parse_recipe("rtn-static-w8a8"),
    "shared": grouped("shared"),
    "resident": grouped("resident"),
    "switched": grouped("switched"),
    "low-rank": parse_recipe("tr-dq-plus-low-rank-w4a4"),
    "duquant": parse_recipe("duquant-w4a4"),
    "q-dit": parse_recipe("q-dit-w4a8"),
    "lrq-dit": parse_recipe("lrq-dit-w3a4"),
    "tfmq-dm": parse_recipe("tfmq-dm-w4a8"),
    "tq-dit": parse_recipe("tq-dit-w8a8"),
    "int8-attention": parse_recipe("tr-dq-int8-attention-w4a8"),
    "quantized+sharing": with_sharing(grouped("switched"), SHARING),
    "sharing alone": with_sharing(Recipe(name="fp"), SHARING),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_reloaded_pipeline_samples_the_same_bits(
    name: str, convert_tiny: Convert, picture: Callable[[nn.Module], Tensor], save: Callable[..., Saved], tmp_path: Path
) -> None:
    recipe = quick(RECIPES[name])
    conversion = convert_tiny(recipe)
    live = picture(conversion.denoiser)
    saved = save(conversion, tmp_path / "model")
    denoiser = reload(saved.folder)
    assert torch.equal(picture(denoiser), live)
    found = denoiser.trdq_conversion
    assert found.recipe == recipe
    assert found.facts()["kernels"] == conversion.facts()["kernels"]
    assert found.facts()["weight_bytes"] == conversion.facts()["weight_bytes"]
    assert found.calibration == conversion.calibration
