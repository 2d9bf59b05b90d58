"""Output weights by random probes: against exact derivatives, on every kind of layer, bounded and repeatable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.errors import CalibrationError, Cancelled
from trdq_core.scale_search import OutputSamples
from trdq_core.second_order import CALLS, Call, _scorable, _spread, output_weights, replay

STEPS = 4
ABOUT = {"prompts": ["red apple", "tiger face"], "steps": STEPS, "guidance": 3.5, "seed": 0}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(scope="module")
def found(model: PixArtModel) -> dict[str, OutputSamples]:
    layers = [layer.name for layer in model.linears()]
    return output_weights(model, ABOUT, layers, rows=32, probes=2)


class Two(nn.Module):
    """Two linears with a nonlinearity between; predicts (batch, 3, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.double().requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor, timestep: float = 0.0) -> torch.Tensor:
        return self.second(torch.tanh(self.first(hidden_states)))


def test_the_weights_are_the_expected_squared_derivatives() -> None:
    """Row by row: sum over predictions of (d prediction / dy)^2, which is E[g^2] for random signs."""
    denoiser, x = Two(), torch.randn(1, 3, 4, dtype=torch.float64)
    call = Call((), {"hidden_states": x, "timestep": torch.tensor([700.0])})
    samples = replay(denoiser, call, ["first", "second"], rows=3, probes=4000, seed=0)
    y = denoiser.first(x)
    slope = 1 - torch.tanh(y[0]).square()
    exact = slope.square() * denoiser.second.weight.square().sum(0)
    assert torch.allclose(samples["first"].weight.double(), exact, rtol=0.1)
    assert torch.allclose(samples["second"].weight, torch.ones(3, 2)), "the prediction itself: every probe says 1"
    assert torch.equal(samples["first"].inputs, x[0].half())
    assert (samples["first"].timesteps == 700).all()


def test_invariant_30_the_gradient_is_not_zero_where_that_of_tq_dit_is() -> None:
    """The release weighs by the divergence between prediction and full-precision prediction, which are equal there."""
    denoiser, x = Two(), torch.randn(1, 3, 4, dtype=torch.float64)
    y = denoiser.first(x).requires_grad_()
    prediction = denoiser.second(torch.tanh(y))
    target = prediction.detach().softmax(-1)
    divergence = nn.functional.kl_div(prediction.log_softmax(-1), target, reduction="sum")
    (degenerate,) = torch.autograd.grad(divergence, y)
    assert float(degenerate.norm() / y.detach().norm()) < 1e-12
    call = Call((), {"hidden_states": x, "timestep": torch.tensor([0.0])})
    weight = replay(denoiser, call, ["first"], rows=3, probes=1, seed=0)["first"].weight
    assert float(weight.sum().sqrt() / y.detach().norm()) > 1e-6


def test_invariant_30_every_layer_of_a_model_has_a_gradient(
    model: PixArtModel, found: dict[str, OutputSamples]
) -> None:
    """Layers that read the timestep or the text alone included."""
    assert list(found) == [layer.name for layer in model.linears()]
    for layer in model.linears():
        samples = found[layer.name]
        rows = len(samples.inputs)
        assert samples.inputs.shape == (rows, layer.in_features) and samples.inputs.dtype == torch.float16
        assert samples.weight.shape == (rows, layer.out_features) and samples.timesteps.shape == (rows,)
        assert 8 <= rows <= 32 and len(set(samples.timesteps.tolist())) == STEPS
        outputs = samples.inputs.float() @ model.denoiser.get_submodule(layer.name).weight.T
        # Neither the ones that stand in for no gradient, nor noise.
        assert float(samples.weight.sqrt().norm() / outputs.norm()) > 1e-6, layer.name
        assert not (samples.weight == 1).all() or layer.role == "final", layer.name


def test_linears_of_one_input_get_the_same_rows(found: dict[str, OutputSamples]) -> None:
    q, k, v = (found[f"transformer_blocks.1.attn1.to_{name}"] for name in "qkv")
    assert torch.equal(q.inputs, k.inputs) and torch.equal(k.inputs, v.inputs)
    assert not torch.equal(q.weight, k.weight)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    model: PixArtModel, found: dict[str, OutputSamples]
) -> None:
    name = "transformer_blocks.0.ff.net.2"
    again = output_weights(model, ABOUT, [name], rows=32, probes=2)[name]
    assert torch.equal(again.inputs, found[name].inputs)
    # Which layers are watched changes nothing either: the probes are drawn before them.
    assert torch.allclose(again.weight, found[name].weight, rtol=1e-4)
    other = output_weights(model, ABOUT, [name], rows=32, probes=2, seed=5)[name]
    assert not torch.equal(other.weight, again.weight) and not torch.equal(other.inputs, again.inputs)


def test_the_model_is_left_as_it_was(model: PixArtModel, found: dict[str, OutputSamples]) -> None:
    assert found
    assert not model.denoiser._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.denoiser.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.denoiser.parameters())


def test_a_layer_without_influence_counts_every_output_alike() -> None:
    samples = OutputSamples(torch.ones(2, 3).half(), torch.zeros(2, 4), torch.zeros(2))
    assert torch.equal(_scorable(samples).weight, torch.ones(2, 4))
    with pytest.raises(CalibrationError, match="not finite"):
        _scorable(samples._replace(weight=torch.full((2, 4), float("nan"))))


@pytest.mark.parametrize(("prompts", "steps"), [(1, 4), (16, 20), (3, 50), (40, 2)])
def test_replayed_calls_are_spread_over_steps_and_prompts(prompts: int, steps: int) -> None:
    count = min(CALLS, prompts * steps)
    chosen = _spread(prompts, steps, count)
    assert len(chosen) == count
    assert all(0 <= prompt < prompts and 0 <= step < steps for prompt, step in chosen)
    assert len({step for _, step in chosen}) == min(steps, count)
    assert len({prompt for prompt, _ in chosen}) == min(prompts, count)


def test_bad_settings_and_unknown_calls_are_refused(model: PixArtModel) -> None:
    with pytest.raises(CalibrationError, match="got 0 rows and 1 probes"):
        output_weights(model, ABOUT, ["proj_out"], rows=0, probes=1)
    with pytest.raises(Cancelled):
        output_weights(model, ABOUT, ["proj_out"], rows=4, probes=1, cancelled=lambda: True)
    denoiser = Two()
    denoiser.idle = nn.Linear(4, 4)
    call = Call((), {"hidden_states": torch.randn(1, 3, 4).double(), "timestep": 0.0})
    assert "idle" not in replay(denoiser, call, ["first", "idle"], rows=3, probes=1, seed=0)
