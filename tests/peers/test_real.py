"""The tools themselves on a tiny model, each where it is installed: see requirements-peers.txt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trdq_core import profiling
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.peers.convert import PeerConversion, Sampling, convert_peer
from trdq_core.peers.openvino import without_telemetry
from trdq_core.presets import find_peer, missing, parse_recipe
from trdq_core.sampling import sample, sample_batch

SAMPLING = Sampling(("red apple", "tiger face"), 3, 3.5, 0)
# Peer, greatest error of the final latents against FP32, start of a kernel that must have run and how often.
CASES = (
    ("torchao-int8", 0.01, "int8 x int8, torch._int_mm", 20),
    ("quanto-int8", 0.02, "int8 x int8, torch._int_mm", 20),
    ("quanto-int8-weights", 0.01, "int8 weights, multiplied in float32", 20),
    ("bitsandbytes-int8", 0.01, "int8 ", 20),  # which product depends on the chip
    ("openvino-fp32", 1e-4, "OpenVINO FullyConnected float32", 26),
    ("openvino-int8-weights", 0.02, "OpenVINO FullyConnected int8", 20),
    ("openvino-int8-fp32", 0.05, "OpenVINO FullyConnected int8", 20),
    ("openvino-int8-all", 0.05, "OpenVINO FullyConnected int8", 26),
    pytest.param("sdnq-int8", 0.01, "int8 x int8", 16, marks=pytest.mark.slow),  # it compiles each shape
    pytest.param("sdnq-int8-hadamard", 0.01, "int8 x int8", 16, marks=pytest.mark.slow),
    pytest.param("torchao-int8-compile", 0.01, "int8 x int8, torch._int_mm", 20, marks=pytest.mark.slow),
    pytest.param("torch-compile", 1e-4, "float32, torch.compile", 26, marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


def converted(model: PixArtModel, name: str) -> PeerConversion:
    """The peer's denoiser; a skip with the reason where it is not installed."""
    if reason := missing(find_peer(name)):
        pytest.skip(reason)
    return convert_peer(model, parse_recipe(f"peer-{name}"), SAMPLING)


@pytest.mark.parametrize(("name", "error", "kernel", "count"), CASES)
def test_a_tool_samples_nearly_what_the_reference_does(
    model: PixArtModel, name: str, error: float, kernel: str, count: int
) -> None:
    before = {key: value.clone() for key, value in model.denoiser.state_dict().items()}
    conversion = converted(model, name)
    conditioning = model.encode(["rocket"])[0]
    exact = sample(model, conditioning, 5, steps=3, guidance=3.5).latents[-1]
    with model.using(conversion.denoiser):
        other = sample(model, conditioning, 5, steps=3, guidance=3.5).latents[-1]
    found = float((other - exact).norm() / exact.norm())
    assert found < error
    assert all(torch.equal(value, before[key]) for key, value in model.denoiser.state_dict().items())
    facts = conversion.facts()
    assert sum(n for words, n in facts["kernels"].items() if words.startswith(kernel)) == count, facts["kernels"]
    assert facts["file_bytes"] > 0
    if "weight_bytes" in facts:
        assert found > 0
        assert 0.25 <= facts["weight_bytes"] / facts["fp_weight_bytes"] < 0.27
        assert facts["weight_bytes"] < facts["resident_bytes"] < 0.6 * 2_811_456
    else:
        assert facts["resident_bytes"] == pytest.approx(2_811_456, rel=0.01)


@pytest.mark.parametrize("name", ["openvino-fp32", "torchao-int8"])
def test_batches_of_another_size_run_too(model: PixArtModel, name: str) -> None:
    conversion = converted(model, name)
    conditionings = model.encode(["rocket", "face", "red apple"])
    exact = sample_batch(model, conditionings, [1, 2, 3], steps=2, guidance=3.5)
    with model.using(conversion.denoiser):
        other = sample_batch(model, conditionings, [1, 2, 3], steps=2, guidance=3.5)
    assert other.shape == exact.shape
    assert float((other - exact).norm() / exact.norm()) < 0.01


def test_openvino_answers_recorded_calls(model: PixArtModel) -> None:
    """Timing hands the recorded keyword arguments to every column."""
    conversion = converted(model, "openvino-fp32")
    conditioning = model.encode(["rocket"])[0]
    calls = profiling.record_inputs(model.denoiser, lambda: sample(model, conditioning, 0, steps=2, guidance=3.5))
    exact, other = model.denoiser(**calls[1])[0], conversion.denoiser(**calls[1])[0]
    assert torch.allclose(exact, other, atol=1e-5)


def test_telemetry_is_off_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("NNCF_CI", "mine")
    with without_telemetry():
        assert (os.environ["CI"], os.environ["NNCF_CI"]) == ("true", "true")
    assert "CI" not in os.environ
    assert os.environ["NNCF_CI"] == "mine"
