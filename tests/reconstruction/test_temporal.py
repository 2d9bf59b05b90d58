"""What reads only the timestep: found, learned on its own, tabulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.reconstruction.conftest import make_recipe
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.convert import convert
from trdq_core.errors import CalibrationError
from trdq_core.kernels import dispatch
from trdq_core.nn.modules import share_copy
from trdq_core.presets import make_recipe as preset
from trdq_core.reconstruction.calls import tensors_of
from trdq_core.reconstruction.run import reconstruct
from trdq_core.reconstruction.temporal import Tabulated, between, find_temporal, modulation_table, tabulate
from trdq_core.reconstruction.units import Unit
from trdq_core.sampling import sample
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeContext, TimeGroups
from trdq_core.weights.rounding import dequantize_weight

Fit = Callable[..., list]
TEMPORAL = (
    "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2",
    "adaln_single.linear",
)


def test_what_reads_only_the_timestep_is_found(model: PixArtModel, statistics: Statistics) -> None:
    assert find_temporal(model, model.linears(), statistics) == (Unit("temporal", "adaln_single", TEMPORAL),)


def test_timesteps_in_between() -> None:
    assert between([800.0, 1000.0, 400.0], 0.25) == [950.0, 700.0]


def test_invariant_31_the_temporal_block_is_learned_apart(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    temporal = [linear for linear in fit(["embed", "modulation"], None) if linear.name in TEMPORAL]
    recipe = make_recipe(temporal_block=True, iterations=80)
    alone = reconstruct(model, temporal, recipe, statistics)
    assert [(unit.kind, unit.layers) for unit in alone.units] == [("temporal", TEMPORAL)]
    assert alone.units[0].kept and alone.units[0].error_learned < alone.units[0].error_nearest
    together = reconstruct(model, [*temporal, *fit(["mlp_out"])], recipe, statistics)
    assert [unit.kind for unit in together.units] == ["temporal", "block", "block"]
    assert all(name.startswith("transformer_blocks") for unit in together.units[1:] for name in unit.layers)
    for name in TEMPORAL:  # what the blocks learn does not change them
        assert torch.equal(dequantize_weight(alone.weights[name]), dequantize_weight(together.weights[name]))


def test_without_a_temporal_block_they_are_layers(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    result = reconstruct(model, fit(["self_q", "modulation"], None), make_recipe(iterations=2), statistics)
    assert [unit.kind for unit in result.units] == ["block", "block", "layer"]


def test_embedders_of_text_are_layers_of_their_own(model: PixArtModel, statistics: Statistics, fit: Fit) -> None:
    result = reconstruct(model, fit(["embed"], None), make_recipe(temporal_block=True, iterations=2), statistics)
    assert [(unit.kind, unit.unit) for unit in result.units] == [
        ("temporal", "adaln_single"),
        ("layer", "caption_projection.linear_1"),
        ("layer", "caption_projection.linear_2"),
    ]


def test_invariant_31_looking_up_equals_computing(model: PixArtModel, statistics: Statistics) -> None:
    timesteps = (*statistics.timesteps, 123.0)
    table = modulation_table(model, statistics, timesteps)
    module = model.denoiser.adaln_single
    for timestep in timesteps:
        with torch.no_grad():
            computed = module(torch.full((2,), timestep), batch_size=2, hidden_dtype=torch.float32)
        looked_up = table.lookup("adaln_single", timestep, 2)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(computed, looked_up, strict=True))
    assert table.nbytes == 4 * len(timesteps) * (6 + 1) * 128
    with pytest.raises(CalibrationError, match="no row for timestep 124"):
        table.lookup("adaln_single", 124.0, 2)


def modulation_of(model: PixArtModel, denoiser: torch.nn.Module) -> list[torch.Tensor]:
    """What the module of the timestep returns at each step of sampling with `denoiser`, and the latents at the end."""
    seen: list[torch.Tensor] = []
    handle = denoiser.adaln_single.register_forward_hook(lambda module, args, out: seen.extend((*tensors_of(out),)))
    with model.using(denoiser):
        run = sample(model, model.encode(["red apple"])[0], 3, steps=4, guidance=3.5)
    handle.remove()
    return [*seen, run.latents[-1]]


def test_invariant_31_a_quantized_model_with_a_table_has_no_modulation_error(
    model: PixArtModel, statistics: Statistics, tmp_path: Path
) -> None:
    rtn = preset("rtn", weight_bits=3)
    every = (dataclasses.replace(rtn.rules[0], roles=(*rtn.rules[0].roles, "modulation", "embed")),)
    conversion = convert(
        model.denoiser, model.linears(), dataclasses.replace(rtn, rules=every), statistics,
        backend=dispatch.select_backend(torch.device("cpu")), storage_folder=tmp_path,
    )  # fmt: skip
    *exact, picture = modulation_of(model, model.denoiser)
    *quantized, _ = modulation_of(model, conversion.denoiser)
    scale = max(one.abs().max() for one in exact)
    assert max((a - b).abs().max() for a, b in zip(exact, quantized, strict=True)) > 0.01 * scale
    tabulate(conversion.denoiser, modulation_table(model, statistics, statistics.timesteps), conversion.time)
    assert isinstance(conversion.denoiser.adaln_single, Tabulated)
    *looked_up, other = modulation_of(model, conversion.denoiser)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(exact, looked_up, strict=True))
    assert not torch.allclose(picture, other, atol=1e-3), "the blocks are quantized all the same"


def test_invariant_31_a_tabulated_model_is_the_same_model(model: PixArtModel, statistics: Statistics) -> None:
    copy, time = share_copy(model.denoiser), TimeContext(TimeGroups())
    tabulate(copy, modulation_table(model, statistics, statistics.timesteps), time)
    time.attach(copy)
    assert isinstance(copy.adaln_single, Tabulated)
    conditioning = model.encode(["red apple"])[0]
    reference = sample(model, conditioning, 3, steps=4, guidance=3.5)
    with model.using(copy):
        looked_up = sample(model, conditioning, 3, steps=4, guidance=3.5)
    assert torch.allclose(looked_up.latents[-1], reference.latents[-1], atol=1e-4)
