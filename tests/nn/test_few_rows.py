"""Few rows of an unquantized linear: the same numbers, and torch's own way for everything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trdq_core.nn import few_rows
from trdq_core.nn.few_rows import FEW, FewRows, read_weights_once


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "LARGE", 24 * 70)


def test_small_weights_are_left_alone() -> None:
    linear = nn.Linear(24, 69)
    read_weights_once(linear)
    assert not isinstance(linear.forward, FewRows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 24), (24,), (1, 2, 24), (2, 3, 24), (FEW + 1, 24), (0, 24)])
def test_the_same_numbers(shape: tuple[int, ...], bias: bool) -> None:
    linear, x = nn.Linear(24, 70, bias=bias), torch.randn(shape)
    expected = linear(x)
    read_weights_once(linear)
    assert isinstance(linear.forward, FewRows)
    torch.testing.assert_close(linear(x), expected)


def test_other_types_and_many_rows_are_left_to_torch() -> None:
    linear = nn.Linear(24, 70)
    read_weights_once(linear)
    many = torch.randn(FEW + 1, 24)
    assert torch.equal(linear(many), nn.functional.linear(many, linear.weight, linear.bias))
    half = linear.to(torch.bfloat16)
    x = torch.randn(2, 24, dtype=torch.bfloat16)
    assert torch.equal(half(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_a_wrong_width_is_refused_as_ever() -> None:
    linear = nn.Linear(24, 70)
    read_weights_once(linear)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(2, 12))


def test_done_once() -> None:
    linear = nn.Linear(24, 70)
    read_weights_once(linear)
    first = linear.forward
    read_weights_once(linear)
    assert linear.forward is first
