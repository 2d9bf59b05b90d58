"""LoRAs: refused for a quantized pipeline before anything is touched, fused into a full-precision one."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_base, peft
from safetensors.torch import save_file
from torch import Tensor

from tests.adapters.tiny_families import build, with_text
from trdq_core import runs
from trdq_core.adapters import pipelines
from trdq_core.adapters.families import time_by_name
from trdq_core.adapters.generic import TransformerModel
from trdq_core.adapters.lora import fuse_lora
from trdq_core.adapters.roles import find_linears
from trdq_core.data_free import convert_without_data
from trdq_core.errors import ModelError
from trdq_core.kernels import dispatch
from trdq_core.presets import parse_recipe
from trdq_core.specs import RunSpec

LAYER = {
    "flux": "transformer_blocks.0.attn.to_q", "sd3": "transformer_blocks.0.attn.to_q",
    "auraflow": "joint_transformer_blocks.0.attn.to_q",
}  # fmt: skip
QUANTIZED = ("flux", "sd3")
NORM = "transformer_blocks.0.attn.norm_q.weight"
ADVICE = r"load the LoRA onto the original pipeline, call fuse_lora\(\) and unload_lora_weights\(\), then quantize"


def lora(family: str) -> dict[str, Tensor]:
    """A LoRA of rank 2 for one layer, by the names of diffusers."""
    name, generator = f"transformer.{LAYER[family]}", torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_A.weight": torch.randn(2, 64, generator=generator),
        f"{name}.lora_B.weight": torch.randn(64, 2, generator=generator),
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of this test alone."""
    monkeypatch.setenv("TRDQ_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(params=QUANTIZED)
def quantized(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """A tiny pipeline whose transformer was quantized where it stands."""
    pipeline = build(request.param)
    denoiser = pipeline.transformer
    backend = dispatch.select_backend(torch.device("cpu"))
    convert_without_data(
        denoiser, find_linears(denoiser), parse_recipe("rtn-w8a8"), backend=backend, argument=time_by_name(denoiser)
    )
    return pipeline


@pytest.fixture(params=[True, False], ids=["with peft", "without"])
def _peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if peft were there, or not: the refusal is ours either way."""
    for module in (lora_base, peft):
        monkeypatch.setattr(module, "USE_PEFT_BACKEND", request.param)


@pytest.mark.usefixtures("_peft")
def test_every_way_to_load_one_onto_a_quantized_pipeline_is_refused_and_changes_nothing(
    quantized: DiffusionPipeline,
) -> None:
    family = "flux" if "Flux" in type(quantized).__name__ else "sd3"
    denoiser = quantized.transformer
    before = copy.deepcopy(denoiser.state_dict())
    norm = {f"transformer.{NORM}": torch.full((32,), 7.0)}
    ways: list[Callable[[], object]] = [
        lambda: quantized.load_lora_weights(lora(family)),
        lambda: quantized.load_lora_weights(lora(family), adapter_name="x"),
        lambda: quantized.load_lora_weights({**lora(family), **norm}),
        lambda: quantized.load_lora_weights(norm),
        lambda: (
            quantized.load_lora_into_transformer(lora(family), network_alphas=None, transformer=denoiser)
            if family == "flux"
            else quantized.load_lora_into_transformer(lora(family), transformer=denoiser)
        ),
        lambda: denoiser.load_lora_adapter(lora(family)),
        lambda: denoiser.add_adapter(object()),
    ]
    for number, way in enumerate(ways):
        if number == 4 and not lora_base.USE_PEFT_BACKEND:
            continue  # diffusers itself asks for peft there
        with pytest.raises(ModelError, match=ADVICE):
            way()
    after = denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), "give a safetensors file that is there"),
        (lambda file: file.write_bytes(b"x" * 20), "it cannot be read"),
        (lambda file: save_file({"weight": torch.zeros(1)}, file), "none of its tensors is one of a LoRA"),
    ],
    ids=["gone", "damaged", "no LoRA"],
)
def test_files_that_are_no_lora_are_refused(change: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file(lora("flux"), file)
    change(file)
    with pytest.raises(ModelError, match=words):
        fuse_lora(build("flux"), file)


def test_pipelines_that_take_none_are_refused(quantized: DiffusionPipeline, tmp_path: Path) -> None:
    save_file(lora("sd3"), tmp_path / "style.safetensors")
    with pytest.raises(ModelError, match="PixArtSigmaPipeline takes no LoRA in diffusers"):
        fuse_lora(build("pixart-sigma"), tmp_path / "style.safetensors")
    with pytest.raises(ModelError, match=ADVICE):
        fuse_lora(quantized, tmp_path / "style.safetensors")


def test_without_peft_the_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(lora("sd3"), tmp_path / "style.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="install it with pip install peft"):
        fuse_lora(build("sd3"), tmp_path / "style.safetensors")


def test_a_model_with_one_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and learnt roundings are stored by fingerprint, so those of the plain model must not be taken."""
    build("sd3").save_pretrained(tmp_path / "model")
    for number, name in enumerate("ab"):
        save_file({"x.lora_A.weight": torch.full((1,), float(number))}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(pipelines, "fuse_lora", lambda *given: None)
    found = set()
    for name, scale in ((None, 1.0), ("a", 1.0), ("a", 0.5), ("b", 1.0)):
        model = TransformerModel(tmp_path / "model")
        if name is not None:
            model.fuse_lora(tmp_path / f"{name}.safetensors", scale)
        found.add(model.fingerprint())
    assert len(found) == 4


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("family", LAYER)
def test_a_fused_one_is_in_the_weights_and_nothing_else_is_left(family: str, tmp_path: Path) -> None:
    pipeline, tensors = build(family), lora(family)
    save_file(tensors, tmp_path / "style.safetensors")
    before = copy.deepcopy(pipeline.transformer.state_dict())
    fuse_lora(pipeline, tmp_path / "style.safetensors", 0.5)
    up, down = (next(one for name, one in tensors.items() if f"lora_{side}" in name) for side in "BA")
    before[f"{LAYER[family]}.weight"] += 0.5 * up @ down
    after = pipeline.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    foreign = {name.replace("transformer_blocks.0", "transformer_blocks.77"): one for name, one in tensors.items()}
    save_file(foreign, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"LoRA other.safetensors: .* made for (it|this model)"):
        fuse_lora(pipeline, tmp_path / "other.safetensors")
    again = pipeline.transformer.state_dict()
    assert again.keys() == after.keys() and all(torch.equal(again[name], after[name]) for name in after)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_a_run_with_one_is_of_another_model(tmp_path: Path, data: Path) -> None:
    """Its statistics, its report and the card of what it saves name the LoRA; the plain model's runs do not find them."""
    folder, file = tmp_path / "tiny", tmp_path / "style.safetensors"
    with_text("auraflow").save_pretrained(folder)
    save_file(lora("auraflow"), file)
    plain = RunSpec(
        command="save", model=str(folder), recipes=(parse_recipe("smoothquant-w8a8"),), prompts=("tiger face",),
        calibration_prompts=("green salad",), steps=2, height=64, width=64,
    )  # fmt: skip
    with_one = replace(plain, lora=str(file), lora_scale=0.5)
    report = runs.run(with_one, data / "runs" / "20261121-000000000-save-0000")
    assert report["model"] == f"{folder}+style" and report["saved"]["bit_equal"]
    assert (Path(report["saved"]["folder"]) / "README.md").read_text().count("# tiny+style, smoothquant-w8a8") == 1
    assert runs.find_calibration(with_one) is not None and runs.find_calibration(plain) is None
    assert [run.model for run in runs.list_runs()] == [f"{folder}+style"]


def test_random_weights_take_none(tmp_path: Path, data: Path) -> None:
    spec = RunSpec(command="profile", model="random-dit", recipes=(parse_recipe("rtn-w8a8"),), lora="style.safetensors")
    with pytest.raises(ModelError, match="LoRA: random-dit has random weights"):
        runs.run(spec, data / "runs" / "one")


def test_a_full_precision_pipeline_is_left_to_diffusers() -> None:
    pipeline = build("sd3")
    if lora_base.USE_PEFT_BACKEND:
        pipeline.load_lora_weights(lora("sd3"))
        assert pipeline.get_list_adapters()
    else:
        with pytest.raises(ValueError, match="PEFT backend is required"):
            pipeline.load_lora_weights(lora("sd3"))
