"""What a conversion says it weighs is what its buffers and a file hold, and the same seed makes the same buffers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trdq_core import convert as converting
from trdq_core import save_quantized
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion
from trdq_core.fitting import FittedInput
from trdq_core.folders import RunFolder
from trdq_core.kernels import dispatch
from trdq_core.numerics.packing import pack_bits, unpack_bits
from trdq_core.presets import METHODS, make_recipe
from trdq_core.session import Session, convert_for
from trdq_core.specs import Recipe, ReconstructionSpec, RunSpec
from trdq_core.statistics import Statistics
from trdq_core.weights.rounding import CodedWeight, QuantizedWeight, Weight, dequantize_weight

EVERY_WIDTH = ("rtn", "q-dit", "tr-dq")
CASES = [
    *((method, 4, 1) for method in METHODS if method not in ("fp", "tr-dq-release-opensora")),
    *((method, bits, 1) for method in EVERY_WIDTH for bits in (8, 3)),
    ("tr-dq", 4, 2), ("tr-dq-plus", 3, 2),
]  # fmt: skip
SHORT = ReconstructionSpec(iterations=2, batch=2)  # what is learnt does not matter here, that it is counted does


class Made(NamedTuple):
    """A conversion and, before they were packed for the kernels, the integers it was made of."""

    conversion: Conversion
    fits: list[FittedInput]


@pytest.fixture(scope="module")
def session(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRDQ_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        spec = RunSpec(command="evaluate", model=str(tiny_folder), prompts=("rocket",), steps=3)
        folder = RunFolder(tmp_path_factory.mktemp("run"), spec)
        model = PixArtModel(tiny_folder)
        yield Session(spec, folder, lambda: False, model, dispatch.select_backend(model.device))


@pytest.fixture(scope="module")
def statistics(session: Session) -> Statistics:
    return calibrate(session.model, ["red apple"], steps=3, guidance=3.5, seed=0)


@pytest.fixture(scope="module")
def make(session: Session, statistics: Statistics) -> Callable[..., Made]:
    """Conversions by method, weight bits and time groups, each made once unless it is asked for `again`."""
    kept: dict[tuple[str, int, int], Made] = {}

    def build(method: str, bits: int, groups: int, *, again: bool = False) -> Made:
        key = (method, bits, groups)
        if again or key not in kept:
            with pytest.MonkeyPatch.context() as patch:
                fits: list[FittedInput] = []
                install = converting.install_input
                patch.setattr(
                    converting,
                    "install_input",
                    lambda c, fitted, *rest: (fits.append(fitted), install(c, fitted, *rest)),
                )
                made = Made(convert_for(session, recipe_of(*key), statistics), fits)
            if again:
                return made
            kept[key] = made
        return kept[key]

    return build


def recipe_of(method: str, bits: int, groups: int) -> Recipe:
    """A method's recipe, its learning cut short; several groups stay resident."""
    recipe = make_recipe(method, weight_bits=bits, activation_bits=4 if bits == 4 else 8, groups=groups)
    changes: dict[str, Any] = {"reconstruction": SHORT} if recipe.reconstruction is not None else {}
    return dataclasses.replace(recipe, **changes, **({"storage": "resident"} if groups > 1 else {}))


def buffers(conversion: Conversion) -> dict[str, Tensor]:
    """Every buffer of the quantized layers, biases left out."""
    return {
        f"{layer}.{name}": buffer
        for layer, module in conversion.quantized_layers().items()
        for name, buffer in module.named_buffers()
        if name != "bias"
    }


def in_file(weight: Weight) -> dict[str, Tensor]:
    """The parts of a weight as a file of tightly packed codes holds them: zero points and group scales are bytes."""
    if isinstance(weight, CodedWeight):
        parts = {"codes": pack_bits(weight.codes, weight.bits), "first": weight.parameters[..., :1]}
        rest = weight.parameters[..., 1:]
        return parts | {"rest": rest.to(torch.uint8) if weight.grid == "uniform" else rest}
    codes = pack_bits(weight.values.to(torch.int16) + 2 ** (weight.bits - 1), weight.bits)
    parts = {"codes": codes, "scale": weight.scale}
    if weight.zero_point is not None:
        parts["zero_point"] = weight.zero_point.to(torch.int8)
    return parts | ({} if weight.group_scale is None else {"group_scale": weight.group_scale})


def from_file(weight: Weight, parts: dict[str, Tensor]) -> Weight:
    """The weight that such parts stand for; `weight` says its shape and bits."""
    if isinstance(weight, CodedWeight):
        codes = unpack_bits(parts["codes"], weight.bits, weight.codes.numel()).view(weight.codes.shape)
        return weight._replace(codes=codes, parameters=torch.cat([parts["first"], parts["rest"].float()], -1))
    values = unpack_bits(parts["codes"], weight.bits, weight.values.numel()).view(weight.values.shape)
    zero_point = parts["zero_point"].float() if "zero_point" in parts else None
    return QuantizedWeight(
        (values.to(torch.int16) - 2 ** (weight.bits - 1)).to(torch.int8), parts["scale"], zero_point,
        parts.get("group_scale"), weight.group_size, weight.bits,
    )  # fmt: skip


def whole_file(made: Made) -> tuple[dict[str, Tensor], dict[str, tuple[Weight, list[str]]]]:
    """Tensors of a file of the quantized layers, and for each weight the names of its parts."""
    tensors, places = {}, {}
    for fitted in made.fits:
        for index, one in enumerate(fitted.distinct):
            for layer, weight in one.weights.items():
                parts = {f"{layer}.{index}.{name}": part.contiguous() for name, part in in_file(weight).items()}
                tensors |= parts
                places[f"{layer}.{index}"] = (weight, list(parts))
    for name, module in made.conversion.quantized_layers().items():
        if module.low_rank_up is not None:
            tensors[f"{name}.low_rank_up"] = module.low_rank_up
        owned = dict(module.named_buffers())  # the first linear of an input carries its transform
        tensors |= {f"{name}.{key}": value for key, value in owned.items() if key.startswith("input_quantizer.")}
    return tensors, places


def tensor_bytes(file: Path) -> int:
    """What the tensors of a safetensors file take: all but its header."""
    data = file.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize(("method", "bits", "groups"), CASES)
def test_invariant_37_reported_bits_are_those_of_buffers_and_of_a_file(
    make: Callable[..., Made], tmp_path: Path, method: str, bits: int, groups: int
) -> None:
    made = make(method, bits, groups)
    facts, layers = made.conversion.facts(), made.conversion.quantized_layers()
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    held = sum(buffer.nbytes for buffer in buffers(made.conversion).values())
    assert facts["weight_bytes"] == held
    assert facts["effective_bits"] == pytest.approx(8 * held / weights, abs=1e-6)
    tensors, places = whole_file(made)
    save_file(tensors, tmp_path / "packed.safetensors")
    packed = tensor_bytes(tmp_path / "packed.safetensors")
    assert facts["packed_bits"] == pytest.approx(8 * packed / weights, abs=1e-6)
    assert facts["sets"] == max(len(fitted.distinct) for fitted in made.fits) <= groups
    with safe_open(tmp_path / "packed.safetensors", "pt") as stored:
        for weight, names in places.values():
            read = from_file(weight, {name.rpartition(".")[2]: stored.get_tensor(name) for name in names})
            assert torch.equal(dequantize_weight(read), dequantize_weight(weight)), "the file is all that it takes"
    save_quantized(made.conversion.denoiser, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    assert facts["file_bytes"] == file.stat().st_size, "the file that saving writes"


def test_a_branch_and_a_reconstruction_were_among_them(make: Callable[..., Made]) -> None:
    branch = make("svdquant", 4, 1).conversion.quantized_layers().values()
    assert all(layer.low_rank_up is not None for layer in branch)
    assert make("tfmq-dm", 4, 1).conversion.facts()["reconstruction"] is not None
    assert 2 in {layer.sets for layer in make("tr-dq", 4, 2).conversion.quantized_layers().values()}


def digest(conversion: Conversion) -> str:
    """A digest of names, types and bytes of all buffers."""
    found = hashlib.sha256()
    for name, buffer in sorted(buffers(conversion).items()):
        found.update(f"{name}{buffer.dtype}{tuple(buffer.shape)}".encode())
        found.update(buffer.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("method", "bits", "groups"), [case for case in CASES if case[1] == 4])
def test_invariant_38_the_same_seed_makes_the_same_artefact(
    make: Callable[..., Made], method: str, bits: int, groups: int
) -> None:
    first = digest(make(method, bits, groups).conversion)
    assert first == digest(make(method, bits, groups, again=True).conversion)
    if method in EVERY_WIDTH and groups == 1:
        assert first != digest(make(method, 8, 1).conversion)
