"""Invariant 32: groups tile the time axis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trdq_core.errors import RecipeError
from trdq_core.specs import TimeGroupSpec
from trdq_core.timegroups import TimeContext, TimeGroups, make_groups, timestep_value


@pytest.mark.parametrize(
    "spec",
    [
        TimeGroupSpec(),
        TimeGroupSpec(count=7),
        TimeGroupSpec(kind="edges", edges=(10.0, 500.5)),
        TimeGroupSpec(kind="per_step"),
    ],
)
def test_032_every_timestep_is_in_exactly_one_group(spec: TimeGroupSpec) -> None:
    groups = make_groups(spec, timesteps=(999, 700, 30))
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


def test_leaving_the_calibrated_range_warns_once() -> None:
    context = TimeContext(TimeGroups(), calibrated=(100.0, 900.0))
    context.set(910)  # within a fiftieth of the axis: silent
    with pytest.warns(UserWarning, match="timestep 999 lies outside the calibrated range 100 to 900"):
        context.set(999)
    context.set(999)


def test_timesteps_of_any_form() -> None:
    assert timestep_value(3) == timestep_value(torch.tensor(3)) == timestep_value(torch.tensor([3, 3])) == 3.0
