"""Switched sets on a GPU: the order of copies and waits, seen through an engine that copies as late as it may."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.nn.test_linear import make
from trdq_core.checkpoints.describe import set_name, stored_tensors
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.switched import SwitchedSets, keep_first_set, set_buffers, write_sets
from trdq_core.nn.switched_device import CudaEngine, DeviceSets, block_of

GROUPS, WIDTH = 4, 100
CPU = torch.device("cpu")


class LateEngine:
    """Copies only when somebody waits for them, so that whoever reads without waiting reads the set before."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.log: list[str] = []
        self.copies: list[Callable[[], Tensor]] = []
        self.done = 0
        self.lock = threading.Lock()

    def page_locked(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def begin(self) -> int:
        self.log.append("begin")
        return len(self.copies)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        self.log.append("copy")
        self.copies.append(lambda: target.copy_(source))

    def mark(self) -> int:
        return len(self.copies)

    def hold_computation(self, mark: int) -> None:
        self.log.append(f"wait {mark}")
        self._finish(mark)

    def hold_host(self, mark: int) -> None:
        self.log.append(f"host {mark}")
        self._finish(mark)

    def seconds(self, first: int, last: int) -> float:
        self._finish(last)
        return 0.5

    def _finish(self, mark: int) -> None:
        with self.lock:  # each copy happens once, whoever of two threads waits for it first
            for copy in self.copies[self.done : mark]:
                copy()
            self.done = max(self.done, mark)


class Holder(nn.Module):
    """Two buffers of other types and odd sizes, whose values name their set."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("levels", torch.zeros(1, WIDTH + 1, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(1, 3))
        self.derived: Tensor | None = None

    def refresh(self) -> None:
        self.derived = None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.levels.float().sum() + self.scale.sum()


class Denoiser(nn.Module):
    """Two blocks of one module each, and one outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.blocks = Holder(), nn.ModuleList(nn.Sequential(Holder()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ONE = WIDTH + 1 + 3  # what a module adds, times the number of the set


class Bench:
    """Device sets of such a denoiser, without a file or a thread."""

    def __init__(self, *, watched: bool = True) -> None:
        self.model, self.engine, self.reads = Denoiser(), LateEngine(), []
        self.modules = {name: part for name, part in self.model.named_modules() if isinstance(part, Holder)}
        keys = dict.fromkeys(self.modules, ("levels", "scale"))
        self.sets = DeviceSets(self.modules, keys, self.read, self.engine, self.model if watched else None)

    def read(self, group: int, name: str) -> Tensor:
        self.reads.append(group)
        prefix, _, key = name.rpartition(".")
        return torch.full_like(self.modules[prefix]._buffers[key], group)

    def held(self) -> list[int]:
        """The set that each module holds: head, first and second block."""
        return [int(module.levels[0, -1]) for module in self.modules.values()]

    @torch.no_grad()
    def step(self) -> float:
        return float(self.model(torch.zeros(())))


def test_buffers_lie_side_by_side_and_stay_where_they_are() -> None:
    """One piece of memory a block, aligned; a swap changes no address, and nothing outside of the modules holds it."""
    bench = Bench()
    before = {name: module.levels.data_ptr() for name, module in bench.modules.items()}
    for module in bench.modules.values():
        assert module.levels.untyped_storage().data_ptr() == module.scale.untyped_storage().data_ptr()
        assert (module.scale.data_ptr() - module.levels.data_ptr()) % 256 == 0
    bench.sets.bring(3)
    assert bench.step() == 9 * ONE
    assert {name: module.levels.data_ptr() for name, module in bench.modules.items()} == before
    assert bench.sets.fits()


def test_each_block_waits_for_its_own_copy() -> None:
    """Nothing is read before it is there, and nothing waits for what comes later."""
    bench = Bench()
    bench.step()  # the hooks run, so they can be relied on
    bench.engine.log.clear()
    bench.sets.stage(3)
    bench.sets.bring(3)
    # What is outside of blocks comes first and is waited for at once.
    assert bench.engine.log == ["begin", "copy", "wait 1", "copy", "copy"]
    assert bench.held() == [3, 0, 0]
    with torch.no_grad():
        assert float(bench.model.blocks[0](torch.zeros(()))) == 3 * ONE
    assert bench.held() == [3, 3, 0]
    assert bench.step() == 9 * ONE
    assert bench.engine.log[5:] == ["wait 2", "wait 3"]
    assert bench.step() == 9 * ONE
    assert len(bench.engine.log) == 7  # once there, nobody waits again


@pytest.mark.parametrize("watched", [True, False])
def test_without_hooks_everything_is_waited_for_at_once(watched: bool) -> None:
    """Where blocks are unknown, and where no hook ran since the last swap, as when a CUDA graph replays."""
    bench = Bench(watched=watched)
    if not watched:
        bench.step()
    for group in (3, 2):
        bench.sets.bring(group)
        assert bench.held() == [group] * 3


def test_a_graph_recorded_by_hand_can_ask_for_everything() -> None:
    """Replaying runs no hook, so whoever replays after steps that did says so."""
    bench = Bench()
    bench.step()
    bench.sets.bring(3)
    assert bench.held() == [3, 0, 0]
    bench.sets.settle()
    assert bench.held() == [3, 3, 3]


def test_a_set_that_was_foreseen_is_not_read_again_and_others_are_read_at_once() -> None:
    """Reading belongs to the thread; only what nobody foresaw is read while the sampling thread waits."""
    bench = Bench()
    bench.sets.stage(3)
    assert set(bench.reads) == {3}
    bench.reads.clear()
    bench.sets.bring(3)
    assert not bench.reads
    bench.sets.stage(2)
    bench.reads.clear()
    bench.sets.bring(1)
    assert set(bench.reads) == {1}
    assert bench.step() == 3 * ONE


def test_the_next_set_does_not_overwrite_one_that_is_being_copied() -> None:
    """Page-locked memory is filled anew only when the copies from it are done."""
    bench = Bench()
    bench.step()
    bench.sets.bring(3)
    bench.sets.stage(2)
    assert "host 3" in bench.engine.log
    assert bench.step() == 9 * ONE
    bench.sets.bring(2)
    assert bench.step() == 6 * ONE


def test_compiled_blocks_never_read_too_early() -> None:
    """Hooks that ran before compilation promise nothing for graphs made after it."""
    bench = Bench()
    bench.step()
    compiled = torch.compile(bench.model, backend="aot_eager")
    bench.sets.bring(3)  # blocks were called, so their copies are still to be waited for
    with torch.no_grad():
        for group in (3, 2, 1, 3):
            bench.sets.bring(group)
            assert float(compiled(torch.zeros(()))) == 3 * group * ONE
    torch.compiler.reset()


def test_a_first_swap_in_inference_mode_does_not_bind_later_ones() -> None:
    """Memory that is made in inference mode can only be written to there; that of the sets is not."""
    with torch.inference_mode():
        bench = Bench()
        bench.sets.bring(3)
    bench.sets.bring(2)
    assert bench.step() == 6 * ONE
    with torch.inference_mode():
        bench.sets.bring(1)
        assert bench.step() == 3 * ONE


def test_seconds_wait_for_the_last_copy() -> None:
    """What a swap took is asked for afterwards."""
    bench = Bench()
    bench.step()
    seconds = bench.sets.bring(3)
    assert bench.held() == [3, 0, 0]
    assert seconds() == 0.5
    assert bench.held() == [3, 3, 3]


def test_blocks_by_name() -> None:
    """The first number in a name ends its block."""
    assert block_of("transformer_blocks.3.attn1.to_out.0") == "transformer_blocks.3"
    assert block_of("down.1.blocks.2.ff") == "down.1"
    assert block_of("proj_out") == ""


def switched(
    folder: Path, engine: Callable | None = LateEngine
) -> tuple[SwitchedSets, nn.Module, list[Tensor], Tensor]:
    """A block with one quantized layer, its sets in a file, and the output with each; the layer holds set 0."""
    layer, _, x, *_, time = make(sets=2)
    expected = []
    with torch.no_grad():
        for timestep in (100.0, 900.0):
            time.set(timestep)
            expected.append(layer(x))
    time.set(100.0)
    denoiser = nn.Module()
    denoiser.blocks = nn.ModuleList([nn.Sequential(layer)])
    modules = {"blocks.0.0": layer, "blocks.0.0.input_quantizer": layer.input_quantizer}
    sets = [{n: {k: b[i : i + 1] for k, b in set_buffers(m).items()} for n, m in modules.items()} for i in range(2)]
    write_sets(folder / "sets.safetensors", sets)
    keep_first_set(modules.values())
    found = SwitchedSets(folder / "sets.safetensors", modules, denoiser=denoiser, engine=engine)
    time.on_change(found.activate)
    denoiser.time = time
    return found, denoiser, expected, x


@torch.no_grad()
def test_a_layer_follows_its_groups(tmp_path: Path) -> None:
    """Down and up again through a file with its thread: the next group waits in page-locked memory, results are exact."""
    found, denoiser, expected, x = switched(tmp_path)
    for timestep, group in ((900.0, 1), (100.0, 0), (900.0, 1), (900.0, 1), (100.0, 0)):
        denoiser.time.set(timestep)
        assert torch.equal(denoiser.blocks[0](x), expected[group])
        found._reader.wait()
        assert [there.staged for there in found._on_devices.values()] == [1 - group]
    assert found.swap_seconds == pytest.approx([0.5] * 4, abs=0.4)
    assert len(found.swap_seconds) == 4


@torch.no_grad()
def test_a_model_that_was_moved_is_laid_out_anew(tmp_path: Path) -> None:
    """New tensors in the place of its buffers are noticed; the old memory and the old hook are gone."""
    found, denoiser, expected, x = switched(tmp_path)
    layer = denoiser.blocks[0][0]
    denoiser.time.set(900.0)
    (before,) = found._on_devices.values()
    for module in (layer, layer.input_quantizer):
        for name, buffer in set_buffers(module).items():
            module._buffers[name] = buffer.clone()
        module.refresh()
    assert not before.fits()
    denoiser.time.set(100.0)
    assert torch.equal(denoiser.blocks[0](x), expected[0])
    (after,) = found._on_devices.values()
    assert after is not before
    assert len(denoiser.blocks[0]._forward_pre_hooks) == 1
    assert before._blocks[0].parts[0].here() is None


@torch.no_grad()
def test_a_file_of_a_cpu_serves_a_gpu_and_is_saved_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie in panels in every file, and in rows in the buffers of a GPU."""
    found, denoiser, _, _ = switched(tmp_path)
    layer = denoiser.blocks[0][0]
    monkeypatch.setattr(type(layer.input_quantizer), "fit_backend", lambda self, device: None)
    layer.input_quantizer.backend = "triton"  # as after a move
    layer.fit_backend()
    denoiser.time.set(900.0)
    panels = found.tensor(1, "blocks.0.0.qweight")
    assert layer.qweight.dim() == 3
    assert torch.equal(layer.laid_out(layer.qweight, panels=True), panels)
    layers = {name: part for name, part in denoiser.named_modules() if isinstance(part, QuantizedLinear)}
    conversion = SimpleNamespace(denoiser=denoiser, switched=found, time=denoiser.time, quantized_layers=lambda: layers)
    saved = stored_tensors(conversion, denoiser.state_dict())
    assert torch.equal(saved[set_name(1, "blocks.0.0.qweight")], panels)
    assert torch.equal(saved["blocks.0.0.qweight"], found.tensor(0, "blocks.0.0.qweight"))
    conversion.switched = None  # a model without sets: what is in its buffers
    assert torch.equal(stored_tensors(conversion, denoiser.state_dict())["blocks.0.0.qweight"], panels)


@torch.no_grad()
def test_cuda_is_not_touched_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU no stream, event or locked page is asked for, and blocks get no hook."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("Stream", "Event", "current_stream", "stream", "synchronize", "init"):
        monkeypatch.setattr(torch.cuda, name, refused)
    found, denoiser, expected, x = switched(tmp_path, engine=None)
    for timestep, group in ((900.0, 1), (100.0, 0)):
        denoiser.time.set(timestep)
        assert torch.equal(denoiser.blocks[0](x), expected[group])
    assert not found._on_devices
    assert not denoiser.blocks[0]._forward_pre_hooks
    with pytest.raises(AssertionError, match="touched"):
        CudaEngine(torch.device("cuda"))


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(tmp_path: Path) -> None:
    """The same with streams and events of CUDA, the outputs those of the resident sets."""
    found, denoiser, expected, x = switched(tmp_path, engine=None)
    denoiser.to("cuda")
    for timestep, group in ((900.0, 1), (100.0, 0), (900.0, 1)):
        denoiser.time.set(timestep)
        actual = denoiser.blocks[0](x.cuda()).cpu()
        assert float((actual - expected[group]).norm() / expected[group].norm()) < 2e-3
    assert len(found.swap_seconds) == 3
