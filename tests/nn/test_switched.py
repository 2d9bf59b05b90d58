"""Switched storage: exact, small in memory, refused when its file is damaged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.nn.test_linear import make
from trdq_core.errors import CalibrationError, StorageError
from trdq_core.nn.mapped_sets import Reader
from trdq_core.nn.switched import SwitchedSets, set_buffers, write_sets


@torch.no_grad()
def test_swapping_brings_each_set_into_the_layers(tmp_path: Path) -> None:
    layer, _, x, *_, time = make(sets=2)
    expected = {}
    for timestep in (100.0, 900.0):
        time.set(timestep)
        expected[timestep] = layer(x)
    time.set(100.0)
    modules = {"layer": layer, "layer.input_quantizer": layer.input_quantizer}
    file = tmp_path / "sets.safetensors"
    write_sets(
        file, [{n: {k: b[i : i + 1] for k, b in set_buffers(m).items()} for n, m in modules.items()} for i in range(2)]
    )
    for module in modules.values():
        for name, buffer in set_buffers(module).items():
            module._buffers[name] = buffer[:1].clone()
        module.sets = 1
        module.refresh()
    switched = SwitchedSets(file, modules)
    time.on_change(switched.activate)
    for timestep in (900.0, 100.0, 900.0):
        time.set(timestep)
        assert torch.equal(layer(x), expected[timestep])
    assert len(switched.swap_seconds) == 3
    assert switched.nbytes == file.stat().st_size


def test_damaged_files_and_full_disks_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="bad.safetensors: the switched sets cannot be read"):
        SwitchedSets(tmp_path / "bad.safetensors", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the switched sets could not be written"):
        write_sets(tmp_path / "file" / "x.safetensors", [{"m": {"b": torch.zeros(1)}}])


def sets_of(folder: Path, count: int, size: int) -> SwitchedSets:
    """A module with one buffer of `size` bytes, whose sets hold their own number."""
    layer, *_ = make()
    write_sets(
        folder / "sets.safetensors",
        [{"m": {"qweight": torch.full((1, size), group, dtype=torch.uint8)}} for group in range(count)],
    )
    for name in list(set_buffers(layer)):
        layer._buffers[name] = torch.zeros(1, size, dtype=torch.uint8) if name == "qweight" else None
    return SwitchedSets(folder / "sets.safetensors", {"m": layer})


def test_the_next_set_is_read_ahead_and_the_last_one_let_go(tmp_path: Path) -> None:
    """Downwards through the groups, and up again for the next run; only pages of two sets are in memory at a time."""
    size = 1 << 22
    switched = sets_of(tmp_path, 4, size)
    assert switched.count == 4
    (layer,) = switched.modules.values()
    for group in (3, 2, 1, 0, 3, 1):  # the last is one that nobody foresaw
        switched.activate(group)
        assert bool((layer.qweight == group).all())
        switched._reader.wait()
        resident = resident_bytes(tmp_path / "sets.safetensors")
        assert size <= resident < 2.1 * size + (1 << 17)
    assert len(switched.swap_seconds) == 6


def resident_bytes(file: Path) -> int:
    """Bytes of a mapped file that this process has in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
        for line in lines
        if line.endswith(str(file))
    )


def test_a_set_that_is_written_to_leaves_the_file_alone(tmp_path: Path) -> None:
    """The mapping is private to the process."""
    switched = sets_of(tmp_path, 2, 100)
    before = (tmp_path / "sets.safetensors").read_bytes()
    switched.tensor(1, "m.qweight").fill_(9)
    assert (tmp_path / "sets.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:5], "requires a buffer"),
        (lambda data: b"\xff" * 8 + data[8:], "within its header"),
        (lambda data: data[:-1], "within a tensor"),
        (lambda data: data[:8] + b"{" + data[9:].replace(b"{", b"[", 1), "cannot be read"),
        (lambda data: b"", "cannot be read"),
    ],
)
def test_files_cut_short_or_overwritten(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    """Each kind of damage that a header can show is one sentence with the file's name."""
    write_sets(tmp_path / "sets.safetensors", [{"m": {"b": torch.zeros(9)}}])
    data = (tmp_path / "sets.safetensors").read_bytes()
    (tmp_path / "bad.safetensors").write_bytes(change(data))
    with pytest.raises(CalibrationError, match=f"bad.safetensors.*{words}"):
        SwitchedSets(tmp_path / "bad.safetensors", {})


def test_the_reader_outlives_a_failure_and_ends_with_its_owner() -> None:
    """An error while reading ahead is nobody's: whoever needs the set meets it. No thread is left behind."""
    before = set(threading.enumerate())
    reader, seen = Reader(), []
    reader.begin(lambda: seen.append(1 / 0))
    reader.wait()
    reader.begin(lambda: seen.append("read"))
    reader.wait()
    assert seen == ["read"]
    (thread,) = [t for t in threading.enumerate() if t not in before]
    del reader
    thread.join(timeout=10)
    assert not thread.is_alive()
