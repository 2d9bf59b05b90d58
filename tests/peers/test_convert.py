"""Handing the model to another tool, with stand-ins for the tools: rows, failures, what stays untouched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.peers import fakes
from trdq_core import runs
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.errors import Cancelled, PeerError
from trdq_core.peers.base import PeerDenoiser
from trdq_core.peers.convert import MAX_CALLS, Sampling, convert_peer
from trdq_core.presets import parse_recipe
from trdq_core.presets import peers as catalogue
from trdq_core.sampling import sample
from trdq_core.specs import RunSpec
from trdq_core.terminal import report_text

SAMPLING = Sampling(("red apple", "tiger face"), 3, 3.5, 0)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PixArtModel:
    return PixArtModel(tiny_folder)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRDQ_DATA_DIR", str(tmp_path / "data"))
    fakes.install(monkeypatch, "good", fakes.rounded)
    fakes.install(monkeypatch, "bad", fakes.broken)
    yield


def spec_of(tiny_folder: Path, command: str, *recipes: str) -> RunSpec:
    return RunSpec(
        command=command, model=str(tiny_folder), recipes=tuple(map(parse_recipe, recipes)), prompts=("rocket", "face"),
        calibration_prompts=("red apple",), steps=3, timing_rounds=2,
    )  # fmt: skip


def test_the_original_keeps_its_weights(model: PixArtModel) -> None:
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    conversion = convert_peer(model, parse_recipe("peer-good"), SAMPLING)
    assert all(torch.equal(value, before[name]) for name, value in model.denoiser.state_dict().items())
    conditioning = model.encode(["rocket"])[0]
    exact = sample(model, conditioning, 0, steps=3, guidance=3.5).latents[-1]
    with model.using(conversion.denoiser):
        other = sample(model, conditioning, 0, steps=3, guidance=3.5).latents[-1]
    assert 0 < float((other - exact).norm() / exact.norm()) < 0.02


def test_facts_are_those_of_what_was_converted(model: PixArtModel) -> None:
    facts = convert_peer(model, parse_recipe("peer-good"), SAMPLING).facts()
    assert facts["kind"] == "peer"
    assert facts["weight_bytes"] == facts["fp_weight_bytes"], "the stand-in keeps its weights in FP32"
    assert facts["effective_bits"] == 32
    assert facts["kernels"] == {"a stand-in": 20}
    assert facts["resident_bytes"] > facts["weight_bytes"]
    assert facts["file_bytes"] >= 0.95 * facts["resident_bytes"]
    every = convert_peer(model, parse_recipe("peer-good-all"), SAMPLING).facts()
    assert every["kernels"] == {"a stand-in": len(model.linears())}


def test_a_tool_that_cannot_is_one_sentence(model: PixArtModel) -> None:
    with pytest.raises(PeerError) as caught:
        convert_peer(model, parse_recipe("peer-bad"), SAMPLING)
    text = str(caught.value)
    assert text.startswith("peer-bad: torch ")
    assert "could not convert or run this model (ValueError: no kernel for this); leave it out." in text
    assert "\n" not in text


def test_a_tool_that_is_not_there_says_what_brings_it(model: PixArtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_installed", lambda package: False)
    with pytest.raises(PeerError, match=r'peer-sdnq-int8: sdnq is not installed; pip install "sdnq>=.*" brings'):
        convert_peer(model, parse_recipe("peer-sdnq-int8"), SAMPLING)


def test_calls_come_from_the_calibration_prompts(model: PixArtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def remember(task):
        seen.append((task.example, list(task.calls())))
        return fakes.rounded(task)

    fakes.install(monkeypatch, "curious", remember)
    convert_peer(model, parse_recipe("peer-curious"), SAMPLING)
    example, calls = seen[0]
    assert len(calls) == 2 * 3 <= MAX_CALLS
    assert set(example) == set(calls[0])
    assert len({float(call["timestep"].flatten()[0]) for call in calls}) == 3
    latents = calls[0]["hidden_states"]
    assert latents.shape[0] == 2, "both guidance branches in one call"
    assert torch.equal(latents[0], model.initial_latents(0)[0]), "the first call has the noise of the seed"


def test_cancelling_stops_the_calls(model: PixArtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch, "curious", lambda task: fakes.rounded(task) if task.calls() else None)
    with pytest.raises(Cancelled):
        convert_peer(model, parse_recipe("peer-curious"), SAMPLING, cancelled=lambda: True)


def test_the_denoiser_answers_as_the_original_does(model: PixArtModel) -> None:
    class Halved(torch.nn.Module):
        def forward(self, **kwargs: torch.Tensor) -> tuple[torch.Tensor]:
            return (kwargs["hidden_states"] / 2,)

    stand_in = PeerDenoiser(Halved(), model.denoiser, "peer-x")
    assert stand_in.config is model.denoiser.config
    assert stand_in.dtype == torch.float32
    assert not list(stand_in.parameters())
    assert torch.equal(stand_in(torch.ones(2), timestep=torch.ones(1))[0], torch.full((2,), 0.5))
    with pytest.raises(AttributeError):
        stand_in.nothing_of_that_name


def test_an_error_while_it_runs_is_one_sentence(model: PixArtModel) -> None:
    class Stops(torch.nn.Module):
        def forward(self, **kwargs: torch.Tensor) -> None:
            raise RuntimeError("shape 3 where 4 was wanted.")

    with pytest.raises(PeerError, match=r"peer-x: it stopped while the model ran \(RuntimeError: shape 3 .* wanted\)"):
        PeerDenoiser(Stops(), model.denoiser, "peer-x")(hidden_states=torch.ones(1))


def test_compare_has_a_row_for_each_tool_and_a_reason_for_what_failed(tiny_folder: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny_folder, "compare", "fp", "rtn-w8a8", "peer-good", "peer-bad")
    report = runs.run(spec, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    rows = report["recipes"]
    assert list(rows) == ["fp", "fp-again", "rtn-w8a8", "peer-good", "peer-bad"]
    assert rows["peer-good"]["kind"] == "peer"
    assert rows["peer-good"]["psnr"] > 20
    assert rows["peer-good"]["step_ms"]["n"] == 2
    assert rows["peer-good"]["fit_seconds"] >= 0
    assert rows["rtn-w8a8"]["calibration_seconds"] == report["calibration"]["seconds"]
    assert rows["rtn-w8a8"]["file_bytes"] < rows["fp"]["file_bytes"] / 2
    assert set(rows["peer-bad"]) == {"kind", "error", "simulated"}
    text = report_text(report)
    assert "left out: peer-bad: " in text
    assert "a stand-in x 20" in text


def test_tools_alone_need_no_calibration(tiny_folder: Path, tmp_path: Path) -> None:
    report = runs.run(spec_of(tiny_folder, "profile", "fp", "peer-good", "peer-bad"), tmp_path / "run")
    assert report["calibration"] is None
    rows = report["recipes"]
    assert rows["fp"]["weight_bytes"] == rows["peer-good"]["fp_weight_bytes"]
    assert rows["peer-good"]["denoise_ms"] > 0
    assert "denoise_ms" not in rows["peer-bad"]


def test_evaluate_goes_on_after_a_tool_that_failed(tiny_folder: Path, tmp_path: Path) -> None:
    report = runs.run(spec_of(tiny_folder, "evaluate", "fp", "peer-bad", "peer-good"), tmp_path / "run")
    rows = report["recipes"]
    assert rows["peer-bad"]["kind"] == "failed"
    assert rows["peer-good"]["kind"] == "peer"
    assert rows["peer-good"]["bits"] == "W8A8"
    assert rows["peer-good"]["calibration_seconds"] == 0
    assert rows["peer-good"]["final_latent_sqnr_db"] > 20
