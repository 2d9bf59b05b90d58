"""Walking and changing module trees."""

from __future__ import annotations

import torch
from torch import nn

from trdq_core.nn.modules import ALIGNMENT, align


def test_tensors_from_anywhere_in_a_file_begin_where_vectors_do() -> None:
    stored = torch.arange(100, dtype=torch.float32)
    linear = nn.Linear(4, 4)
    linear.weight.data, linear.bias.data = stored[1:17].view(4, 4), stored[17:21]
    linear.register_buffer("table", stored[33:40])
    kept = [linear.weight, linear.bias, linear.table]
    expected = [tensor.detach().clone() for tensor in kept]
    assert all(tensor.data_ptr() % ALIGNMENT for tensor in kept)
    align(linear)
    assert all(a is b for a, b in zip([linear.weight, linear.bias, linear.table], kept, strict=True))
    assert not any(tensor.data_ptr() % ALIGNMENT for tensor in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
