"""The torch path under torch.compile: what machines without the C++ library have in the place of it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import make_input, make_stages, make_weight
from trdq_core.kernels import dispatch

STAGES = [{}, {"scale": True, "permute": True, "hadamard": 32}, {"rotation": 32, "permute": True, "second": 64}]


def layer(bits: int, parts: dict[str, int]) -> Callable[[Tensor], Tensor]:
    """A quantized linear on the torch path."""
    weight, stages = make_weight(70, 64, bits, groups=0 if bits == 8 else 2, zero_point=True), make_stages(64, **parts)

    def run(x: Tensor) -> Tensor:
        return dispatch.linear_from_float(x, stages, weight, torch.ones(70), 8, False, backend="torch")

    return run


@pytest.mark.parametrize("parts", STAGES, ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("bits", [8, 4])
def test_one_graph_with_the_same_result(bits: int, parts: dict[str, int]) -> None:
    """Nothing in the eager path breaks a graph, so whoever compiles a denoiser compiles it too."""
    eager, x = layer(bits, parts), make_input(5, 64)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4 * float(eager(x).abs().max()))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif("TRDQ_COMPILE_ALL" not in os.environ, reason="takes a minute; set TRDQ_COMPILE_ALL to run it")
def test_code_of_inductor_gives_the_same_result() -> None:
    """Real code generation: at most a rounding tie moves a level."""
    eager, x = layer(8, STAGES[1]), make_input(5, 64)
    actual, expected = torch.compile(eager, fullgraph=True)(x), eager(x)
    torch.compiler.reset()
    assert float((actual - expected).norm() / expected.norm()) < 2e-3
