"""What a conversion holds beside the model: the integers and one input's temporaries, however deep the model is."""

from __future__ import annotations

import gc
import itertools
import json
import platform
import resource
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.tiny import tiny_pipeline
from trdq_core import allocator, data_free
from trdq_core import convert as conversion_module
from trdq_core.adapters.pixart import PixArtModel
from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion, convert
from trdq_core.kernels import dispatch
from trdq_core.nn.modules import module_bytes
from trdq_core.plan import group_inputs
from trdq_core.presets import make_recipe
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics

BACKEND = dispatch.select_backend(torch.device("cpu"))
LAYERS = 6
RTN = make_recipe("rtn")


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    tiny_pipeline(LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture
def model(deep_folder: Path) -> PixArtModel:
    return PixArtModel(deep_folder)


@pytest.fixture(scope="module")
def statistics(deep_folder: Path) -> Statistics:
    return calibrate(PixArtModel(deep_folder), ["red apple"], steps=2, guidance=3.5, seed=0)


def allocated(work: Callable[[], Conversion], folder: Path) -> tuple[list[int], Conversion]:
    """Bytes of tensors that `work` made and that live, after each allocation and release; and its result."""
    gc.collect()  # else what an earlier test left is counted when it goes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        made = work()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    live, curve = 0, []
    for _, count in sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"):
        live += count
        curve.append(live)
    return curve, made


@pytest.mark.parametrize("recipe", [RTN, make_recipe("smoothquant", weight_bits=4)], ids=lambda recipe: recipe.name)
def test_a_conversion_never_holds_two_full_precision_copies(
    model: PixArtModel, statistics: Statistics, recipe: Recipe, tmp_path: Path
) -> None:
    def work() -> Conversion:
        return convert(model.denoiser, model.linears(), recipe, statistics, backend=BACKEND, storage_folder=tmp_path)

    curve, made = allocated(work, tmp_path)
    facts = made.facts()
    biases = sum(layer.bias.nbytes for layer in made.quantized_layers().values() if layer.bias is not None)
    kept = facts["weight_bytes"] + biases
    assert kept <= curve[-1] < 1.05 * kept  # what is left is the quantized layers
    widest = max(module.weight.numel() for module in model.denoiser.modules() if isinstance(module, nn.Linear))
    assert max(curve) - kept < 6 * 8 * widest  # six float64 copies of one weight, whatever the depth
    assert max(curve) < 0.8 * module_bytes(model.denoiser)


@pytest.fixture
def full_precision_left(monkeypatch: pytest.MonkeyPatch, model: PixArtModel) -> list[int]:
    """Filled after each input with the count of weights to be quantized that are still there."""
    names = [layer.name for group in group_inputs(model.linears(), RTN) for layer in group.layers]
    weights = [weakref.ref(model.denoiser.get_submodule(name).weight) for name in names]
    left = [len(weights)]

    def count() -> None:
        left.append(sum(weight() is not None for weight in weights))

    for module in (conversion_module, data_free):
        monkeypatch.setattr(module, "release_free_memory", count)
    return left


@pytest.mark.parametrize("calibrated", [True, False])
def test_in_place_the_full_precision_weights_go_one_by_one(
    model: PixArtModel, statistics: Statistics, full_precision_left: list[int], tmp_path: Path, calibrated: bool
) -> None:
    denoiser, layers, left = model.denoiser, model.linears(), full_precision_left
    if calibrated:
        made = convert(denoiser, layers, RTN, statistics, backend=BACKEND, storage_folder=tmp_path, in_place=True)
    else:
        made = data_free.convert_without_data(denoiser, layers, RTN, backend=BACKEND)
    assert made.denoiser is denoiser
    sizes = [len(group.layers) for group in group_inputs(layers, RTN)]
    assert [before - after for before, after in itertools.pairwise(left)] == sizes
    assert left[-1] == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_freed_memory_between_what_stays_goes_back() -> None:
    process = psutil.Process()
    blocks = [
        torch.ones(25_000) for _ in range(2000)
    ]  # 100 kB each: below glibc's threshold for mapping them by themselves
    kept = blocks[::2]
    blocks.clear()
    before = process.memory_info().rss
    allocator.release_free_memory()
    assert before - process.memory_info().rss > 50 << 20
    assert len(kept) == 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_large_temporaries_take_what_was_freed() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(20 << 20)  # 80 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    process, usual = psutil.Process(), faults()
    with allocator.keep_freed_memory(), allocator.keep_freed_memory():
        faults()
        assert faults() * 5 < usual
        held = process.memory_info().rss
    assert held - process.memory_info().rss > 40 << 20, "handed back"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    allocator._libc.cache_clear()
    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    try:
        assert allocator._libc() is None
        with allocator.keep_freed_memory():
            allocator.release_free_memory()
    finally:
        allocator._libc.cache_clear()
