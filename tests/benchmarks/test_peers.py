"""What the comparison with other tools measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import nn

from benchmarks import peers
from benchmarks.sharing import made_up_statistics
from trdq_core.adapters.roles import find_linears
from trdq_core.convert import convert
from trdq_core.kernels import dispatch
from trdq_core.plan import rule_for


def test_ours_is_measured_with_every_rotation_too() -> None:
    names = peers.recipe_names()
    spec = peers.specification("random-dit", names, rounds=3, steps=peers.GROUPS)
    found = {recipe.name: recipe for recipe in spec.recipes}
    assert list(found) == names
    rotated = found[f"tr-dq-w8a8{peers.ROTATED}"]
    assert not rotated.do_no_harm
    assert rotated.rules == found["tr-dq-w8a8"].rules
    assert found["tr-dq-w8a8"].do_no_harm


def test_a_peer_on_every_linear_is_beside_itself_on_ours() -> None:
    names = peers.recipe_names()
    for tool in peers.WHOLE:
        assert f"{peers.PREFIX}{tool}" in names
        assert f"{peers.PREFIX}{tool}{peers.EVERY_LINEAR}" in names


def tiny_dit() -> nn.Module:
    """Two layers of width 64."""
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_elementwise_affine=False,
    )  # fmt: skip


def tiny_pixart() -> nn.Module:
    """Two layers of width 64 with cross-attention."""
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        cross_attention_dim=64, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip


@pytest.mark.parametrize("build", [tiny_dit, tiny_pixart])
@pytest.mark.parametrize("name", ["tr-dq-w8a8", "tr-dq-w4a8"])
def test_every_rotation_means_every_quantized_linear(build: Callable[[], nn.Module], name: str, tmp_path: Path) -> None:
    """Each linear that a rule names runs behind a rotation or a Hadamard transform, where no gate leaves any out."""
    torch.manual_seed(0)
    model, recipe = build().eval().requires_grad_(False), peers.recipe_called(f"{name}{peers.ROTATED}")
    layers = find_linears(model)
    settings = {"backend": dispatch.select_backend(torch.device("cpu")), "storage_folder": tmp_path}
    made = convert(model, layers, recipe, made_up_statistics(layers), **settings)
    stages = {name: layer.input_quantizer.stages() for name, layer in made.quantized_layers().items()}
    assert set(stages) == {layer.name for layer in layers if rule_for(layer, recipe)}
    bare = [
        name
        for name, own in stages.items()
        if not own.hadamard_block and own.rotation is None and own.second_rotation is None
    ]
    assert not bare
    facts = made.facts()
    assert facts["transformed_layers"] == facts["quantized_layers"] == len(stages) > 10


def test_time_groups_stand_beside_one_set() -> None:
    grouped = peers.recipe_called(f"tr-dq-w4a8{peers.GROUPED}")
    assert f"tr-dq-w4a8{peers.GROUPED}" in peers.recipe_names()
    assert (grouped.time.count, grouped.storage) == (4, "switched")
    assert grouped.rules == peers.recipe_called("tr-dq-w4a8").rules
