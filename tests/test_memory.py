"""What a model needs in memory: counted from headers, compared with what is free, refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trdq_core import memory, models
from trdq_core.arguments import build_parser, spec_from
from trdq_core.errors import MemoryShort, ModelError
from trdq_core.memory import WORK_BYTES, components_of, preflight
from trdq_core.specs import Loading


@pytest.fixture
def sized(tmp_path: Path) -> Path:
    """A folder with a transformer of 3 blocks, a text encoder in two shards, and what is not loaded."""
    for part in ("transformer", "text_encoder", "scheduler"):
        (tmp_path / "model" / part).mkdir(parents=True)
    folder = tmp_path / "model"
    blocks = {f"blocks.{i}.weight": torch.zeros(10, 10 * (i + 1), dtype=torch.float16) for i in range(3)}
    save_file({**blocks, "proj.weight": torch.zeros(5)}, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.zeros(999)}, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    for i in (1, 2):
        save_file(
            {f"block.{i}.weight": torch.zeros(500)}, folder / "text_encoder" / f"model-0000{i}-of-00002.safetensors"
        )
    save_file({"x": torch.zeros(999)}, folder / "text_encoder" / "model.safetensors")
    index = {"weight_map": {f"block.{i}.weight": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_parameters_are_counted_from_headers_of_what_would_be_loaded(sized: Path) -> None:
    encoder, transformer = components_of(sized)
    assert transformer[:2] == ("transformer", 605) and transformer.largest_block == 300
    assert encoder[:2] == ("text_encoder", 1000)
    assert transformer.stored_bytes > 1205


def test_no_tensor_is_read(sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(torch, "load", read)
    file = sized / "transformer" / "diffusion_pytorch_model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    size = file.stat().st_size
    with file.open("r+b") as stream:  # the same header over a hole: values that were never written
        stream.truncate(header)
        stream.truncate(size)
    assert components_of(sized)[1].parameters == 605


def test_needs_are_weights_a_quantized_copy_and_room(sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: WORK_BYTES + 10_000)
    found = preflight("mine", sized, "cpu")
    assert found is not None and found.fits
    assert found.needs == 1605 * 4 + 605 + WORK_BYTES
    monkeypatch.setattr(memory, "free_gpu_memory", lambda: 10)
    found = preflight("mine", sized, "cuda")
    assert found is not None
    assert (found.dtype, found.needs, found.fits) == ("float16", 1605 * 2 + 605 + WORK_BYTES, False)
    ways = {way.flags: way.needs - WORK_BYTES for way in found.ways}
    assert ways == {"--offload sequential": (605 + 500) * 2 + 605}, (
        "the encoder alone is the largest part, so model is no gain"
    )
    assert preflight("random-dit", None, "cpu") is None


def test_what_is_asked_for_is_what_is_counted(sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10)
    monkeypatch.setattr(memory, "free_gpu_memory", lambda: 10)
    found = preflight("mine", sized, "cpu", Loading(dtype="bf16"))
    assert found is not None
    assert (found.dtype, found.needs, found.ways) == ("bfloat16", 1605 * 2 + 605 + WORK_BYTES, ())
    save_file({"x": torch.zeros(400)}, _made(sized / "vae") / "diffusion_pytorch_model.safetensors")
    found = preflight("mine", sized, "cuda", Loading(dtype="fp32"))
    assert found is not None and found.needs == 2005 * 4 + 605 + WORK_BYTES
    assert [(way.flags, way.needs - WORK_BYTES) for way in found.ways] == [
        ("--dtype fp32 --offload model", (605 + 1000) * 4 + 605),
        ("--dtype fp32 --offload sequential", (605 + 500) * 4 + 605),
        ("--dtype bf16", 2005 * 2 + 605),
        ("--dtype bf16 --offload model", (605 + 1000) * 2 + 605),
        ("--dtype bf16 --offload sequential", (605 + 500) * 2 + 605),
    ]
    found = preflight("mine", sized, "cuda", Loading("fp16", "model"))
    assert found is not None and (found.dtype, found.needs) == ("float16", (605 + 1000) * 2 + 605 + WORK_BYTES)
    assert [way.flags for way in found.ways] == ["--dtype fp16 --offload sequential"]


def test_every_flag_of_the_advice_is_one_of_the_command_line(sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10)
    monkeypatch.setattr(memory, "free_gpu_memory", lambda: 10)
    for device in ("cpu", "cuda"):
        found = preflight("mine", sized, device, Loading(dtype="fp32"))
        assert found is not None and found.ways
        for way in found.ways:
            given = vars(build_parser().parse_args(["compare", *way.flags.split()]))
            least = preflight("mine", sized, device, spec_from(given).loading)
            assert least is not None and least.needs == way.needs


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_does_not_fit_is_refused_with_what_to_do(sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: WORK_BYTES + 4000)
    found = preflight("mine", sized, "cpu")
    assert found is not None
    with pytest.raises(
        MemoryShort, match="mine: needs about .* in float32 and .* are free; it would need .* with --dtype bf16"
    ) as told:
        memory.check_memory(found)
    assert "--offload" not in str(told.value), "there is no GPU to offload from"
    assert "--anyway" in str(told.value)
    memory.check_memory(None)


def test_a_model_is_looked_at_before_it_is_loaded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(MemoryShort, match="tiny-pixart: needs about"):
        models.load_model(str(tiny_folder), anyway=False)
    assert models.load_model(str(tiny_folder), anyway=True).name == tiny_folder.name


def test_a_damaged_file_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="vae/diffusion_pytorch_model.safetensors is truncated or damaged"):
        components_of(folder)


def test_a_containers_limit_counts_and_its_caches_do_not(tmp_path: Path) -> None:
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 1\ninactive_file 200\n"),
    ):
        (tmp_path / name).write_text(text + "\n")
    assert memory._container_room(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_room(tmp_path) is None
    assert memory.free_memory() > 0


def test_blocks_are_named_up_to_their_number() -> None:
    assert memory._block_of("encoder.block.11.layer.0.weight") == "encoder.block.11"
    assert memory._block_of("proj_out.weight") == "proj_out"
