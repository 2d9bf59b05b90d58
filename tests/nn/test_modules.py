"""Where the weights of a module lie in memory."""

from __future__ import annotations

import torch
from torch import nn

from trdq_core.nn.modules import ALIGNMENT, align


def test_weights_at_odd_addresses_are_moved_and_stay_the_same() -> None:
    linear = nn.Linear(16, 8)
    values, parameter = linear.weight.detach().clone(), linear.weight
    odd = torch.empty(16 * 8 + 1)[1:].view(8, 16).copy_(values)
    linear.weight.data = odd
    linear.register_buffer("table", torch.arange(10.0)[3:])
    assert linear.weight.data_ptr() % ALIGNMENT
    bias = linear.bias.data_ptr()
    align(linear)
    assert not linear.weight.data_ptr() % ALIGNMENT and not linear.table.data_ptr() % ALIGNMENT
    assert linear.weight is parameter and torch.equal(linear.weight, values)
    assert torch.equal(linear.table, torch.arange(3.0, 10.0))
    assert linear.bias.data_ptr() == bias
