"""PixArt-XL with random weights: its shape, its conditionings, the order of guidance branches."""

from __future__ import annotations

import pytest
import torch

from trdq_core.adapters import random_pixart
from trdq_core.models import layers_of_model, models
from trdq_core.sampling import sample_batch


def test_the_whole_model_is_that_of_the_release() -> None:
    """PixArt-XL-2-256x256 has 0.6 billion parameters in 28 blocks; nothing is allocated here."""
    denoiser = random_pixart.build(28, device="meta")
    assert 0.60e9 < sum(parameter.numel() for parameter in denoiser.parameters()) < 0.62e9
    layers = layers_of_model("random-pixart-xl-28")
    assert sum(layer.role == "mlp_in" for layer in layers) == 28
    assert {(layer.in_features, layer.out_features) for layer in layers if layer.role == "mlp_in"} == {(1152, 4608)}
    assert sum(layer.role == "mlp_in" for layer in layers_of_model("random-pixart-xl")) == 4


def test_both_are_listed_for_speed() -> None:
    kinds = {info.name: (info.kind, info.available) for info in models()}
    assert all(kinds[name] == ("speed", True) for name in random_pixart.LAYERS)


def test_unconditional_halves_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_pixart, "build", lambda layers: torch.nn.Linear(1, 1))  # weights have no part in this
    model, seen = random_pixart.RandomPixArt("random-pixart-xl"), []

    def denoiser(hidden_states: torch.Tensor, **others: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(others)
        return (torch.cat([hidden_states] * 2, 1),)

    monkeypatch.setattr(model, "_active", denoiser)
    conditionings = model.encode(["owl", "crab"])
    assert sample_batch(model, conditionings, [0, 1], steps=2, guidance=2).shape == (2, 4, 32, 32)
    assert seen[0]["encoder_attention_mask"].sum(1).tolist() == [1, 1, 20, 20]
    text = seen[0]["encoder_hidden_states"]
    assert torch.equal(text[0], conditionings[0].tensors["text"][0])
    assert torch.equal(text[3], conditionings[1].tensors["text"][1])
    assert torch.equal(model.encode(["owl"])[0].tensors["text"], conditionings[0].tensors["text"])
