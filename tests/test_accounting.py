"""What a conversion says it weighs is what its buffers hold, and the same seed makes the same buffers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from trdq_core.adapters.pixart import PixArtModel
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion
from trdq_core.folders import RunFolder
from trdq_core.kernels import dispatch
from trdq_core.presets import make_recipe
from trdq_core.sensitivity.measure import targets_of
from trdq_core.session import Session, convert_for
from trdq_core.specs import Recipe, RunSpec
from trdq_core.statistics import Statistics

METHODS = ("rtn", "rtn-static", "smoothquant", "quarot", "q-dit", "vidit-q", "tr-dq")


@pytest.fixture(scope="module")
def session(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    spec = RunSpec(command="evaluate", model=str(tiny_folder), prompts=("rocket",), steps=3)
    folder = RunFolder(tmp_path_factory.mktemp("run"), spec)
    model = PixArtModel(tiny_folder)
    return Session(spec, folder, lambda: False, model, dispatch.select_backend(model.device))


@pytest.fixture(scope="module")
def statistics(session: Session) -> Statistics:
    return calibrate(session.model, ["red apple"], steps=3, guidance=3.5, seed=0)


def buffers(conversion: Conversion, names: list[str]) -> dict[str, torch.Tensor]:
    """Every buffer of the quantized layers, biases left out."""
    return {
        f"{layer}.{name}": buffer
        for layer in names
        for name, buffer in conversion.denoiser.get_submodule(layer).named_buffers()
        if name != "bias"
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_invariant_37_reported_bits_are_those_of_the_buffers(
    session: Session, statistics: Statistics, method: str, bits: int
) -> None:
    recipe = make_recipe(method, weight_bits=bits, activation_bits=8)
    conversion, layers = convert_for(session, recipe, statistics), targets_of(session.model.linears(), recipe)
    facts = conversion.facts()
    held = sum(buffer.nbytes for buffer in buffers(conversion, [target.layer.name for target in layers]).values())
    weights = sum(target.layer.in_features * target.layer.out_features for target in layers)
    assert facts["weight_bytes"] == held
    assert facts["effective_bits"] == pytest.approx(8 * held / weights, abs=1e-6)
    if "packed_bits" in facts:
        assert bits < facts["packed_bits"] <= facts["effective_bits"] + 1e-6


def digest(conversion: Conversion, recipe: Recipe, session: Session) -> str:
    """A digest of names, types and bytes of all buffers."""
    found = hashlib.sha256()
    names = [target.layer.name for target in targets_of(session.model.linears(), recipe)]
    for name, buffer in sorted(buffers(conversion, names).items()):
        found.update(f"{name}{buffer.dtype}{tuple(buffer.shape)}".encode())
        found.update(buffer.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_invariant_38_the_same_seed_makes_the_same_artefact(
    session: Session, statistics: Statistics, method: str
) -> None:
    recipe = make_recipe(method, weight_bits=4, activation_bits=4)
    first, second = (digest(convert_for(session, recipe, statistics), recipe, session) for _ in range(2))
    assert first == second
    other = make_recipe(method, weight_bits=8, activation_bits=4)
    assert digest(convert_for(session, other, statistics), other, session) != first
