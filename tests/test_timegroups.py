"""Invariant 32: groups tile the time axis."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.specs import TimeGroupSpec
from trdq_core.timegroups import (
    TimeArgument,
    TimeContext,
    TimeGroups,
    make_groups,
    segment_cuts,
    time_argument,
    timestep_value,
)


@pytest.mark.parametrize(
    "spec",
    [
        TimeGroupSpec(),
        TimeGroupSpec(count=7),
        TimeGroupSpec(kind="edges", edges=(10.0, 500.5)),
        TimeGroupSpec(kind="per_step"),
        TimeGroupSpec(kind="dp", count=2),
        TimeGroupSpec(kind="dp", count=9),
    ],
)
def test_invariant_32_every_timestep_is_in_exactly_one_group(spec: TimeGroupSpec) -> None:
    groups = make_groups(spec, timesteps=(999, 700, 30), absmax=[torch.rand(3, 8)])
    borders = [0, *groups.edges, 1000]
    assert borders == sorted(set(borders))
    for timestep in [*range(0, 1001, 7), 1000]:
        group = groups.group_of(timestep)
        assert 0 <= group < groups.count
        assert borders[group] <= timestep <= borders[group + 1]
    assert len(groups.labels()) == groups.count


def test_per_step_puts_each_calibrated_timestep_in_a_group_of_its_own() -> None:
    steps = (999.0, 856.0, 691.0, 499.0, 272.0)
    groups = make_groups(TimeGroupSpec(kind="per_step"), steps)
    assert sorted(groups.group_of(t) for t in steps) == [0, 1, 2, 3, 4]
    with pytest.raises(RecipeError, match="per_step needs the timesteps"):
        make_groups(TimeGroupSpec(kind="per_step"))


STEPS = tuple(999 - 50.0 * step for step in range(20))  # 20 steps, largest first as they are sampled


def planted(borders: tuple[float, ...], seed: int = 0) -> list[torch.Tensor]:
    """Channel absmax (steps, channels) of three layers that jump where a timestep crosses a border, and wobble by 5 %."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.tensor([sum(t > border for border in borders) for t in STEPS])
    layers = []
    for channels in (16, 64, 24):
        ranges = 10 ** torch.randn(len(borders) + 1, channels, generator=generator)
        layers.append(ranges[level] * (1 + 0.05 * torch.randn(len(STEPS), channels, generator=generator)))
    return layers


@pytest.mark.parametrize("borders", [(574.0,), (124.0, 774.0), (74.0, 324.0, 624.0, 924.0)])
def test_dynamic_programming_finds_planted_changes(borders: tuple[float, ...]) -> None:
    spec = TimeGroupSpec(kind="dp", count=len(borders) + 1)
    assert make_groups(spec, STEPS, planted(borders)).edges == borders


def test_dynamic_programming_is_exact_on_all_cuts() -> None:
    layers = [torch.rand(7, 5, generator=torch.Generator().manual_seed(3)) + 0.01, torch.rand(7, 3) + 0.01]

    def cost(cuts: tuple[int, ...]) -> float:
        logs = [layer.double().log() for layer in layers]
        runs = list(itertools.pairwise((0, *cuts, 7)))
        return sum(float((x[a:b] - x[a:b].mean(0)).square().sum()) / x.shape[1] for x in logs for a, b in runs)

    for count in (2, 3, 4):
        every = list(itertools.combinations(range(1, 7), count - 1))
        assert cost(tuple(segment_cuts(layers, count))) == pytest.approx(min(map(cost, every)))


def test_one_group_and_a_group_for_each_step_are_the_ends_of_dynamic_programming() -> None:
    ranges = planted((574.0,))
    assert make_groups(TimeGroupSpec(kind="dp", count=1), STEPS, ranges) == TimeGroups()
    each = make_groups(TimeGroupSpec(kind="per_step"), STEPS)
    assert make_groups(TimeGroupSpec(kind="dp", count=20), STEPS, ranges) == each
    assert make_groups(TimeGroupSpec(kind="dp", count=500), STEPS, ranges) == each


def test_a_dead_channel_does_not_disturb_the_cuts() -> None:
    ranges = planted((574.0,))
    ranges[0][:, 3] = 0
    assert make_groups(TimeGroupSpec(kind="dp", count=2), STEPS, ranges).edges == (574.0,)


def test_dynamic_programming_needs_ranges() -> None:
    with pytest.raises(RecipeError, match="groups: dp needs the timesteps of a calibration"):
        make_groups(TimeGroupSpec(kind="dp", count=2), STEPS)


def test_the_context_follows_the_denoiser_and_tells_changes_once() -> None:
    class Denoiser(nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return x

    context, denoiser, seen = TimeContext(TimeGroups((500.0,))), Denoiser(), []
    context.on_change(seen.append)
    handle = context.attach(denoiser)
    for timestep in (999, 800, 400, 100):
        denoiser(torch.zeros(1), timestep=torch.tensor([timestep, timestep]))
    assert seen == [1, 0]
    assert context.timestep == 100
    handle.remove()
    denoiser(torch.zeros(1), timestep=torch.tensor([999]))
    assert context.group == 0


def test_flow_matching_time_maps_onto_the_axis() -> None:
    class Denoiser(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x

    for argument, told in (
        (TimeArgument("t", 1), 900.0),
        (TimeArgument("t", 1, 1000.0), 0.9),
        (TimeArgument("t", 1, 1000.0, flipped=True), 0.1),
        (["t", 1, 1000.0, True], 0.1),  # as JSON keeps it
    ):
        context, denoiser = TimeContext(TimeGroups((500.0,))), Denoiser()
        context.attach(denoiser, argument)
        for args, kwargs in (((torch.zeros(1), torch.tensor([told])), {}), ((torch.zeros(1),), {"t": told})):
            context.set(0.0)
            denoiser(*args, **kwargs)
            assert context.timestep == pytest.approx(900.0, abs=1e-3) and context.group == 1
            moved = time_argument(argument).moved(args, kwargs, 250.0)
            assert time_argument(argument).value(*moved) == pytest.approx(250.0, abs=1e-3)


def test_a_call_that_does_not_tell_the_time_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no argument 'sigma'"):
        TimeArgument("sigma", 3).value((torch.zeros(1),), {"t": 1.0})


def test_leaving_the_calibrated_range_warns_once() -> None:
    context = TimeContext(TimeGroups(), calibrated=(100.0, 900.0))
    context.set(910)  # within a fiftieth of the axis: silent
    with pytest.warns(UserWarning, match="timestep 999 lies outside the calibrated range 100 to 900"):
        context.set(999)
    context.set(999)


def test_timesteps_of_any_form() -> None:
    assert timestep_value(3) == timestep_value(torch.tensor(3)) == timestep_value(torch.tensor([3, 3])) == 3.0
