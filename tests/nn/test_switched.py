"""Switched storage: exact, small in memory, refused when its file is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.nn.test_linear import make
from trdq_core.errors import CalibrationError, StorageError
from trdq_core.nn.switched import SwitchedSets, set_buffers, write_sets


@torch.no_grad()
def test_swapping_brings_each_set_into_the_same_memory(tmp_path: Path) -> None:
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
    address = layer.qweight.data_ptr()
    for timestep in (900.0, 100.0, 900.0):
        time.set(timestep)
        assert torch.equal(layer(x), expected[timestep])
    assert layer.qweight.data_ptr() == address
    assert len(switched.swap_seconds) == 3
    assert switched.nbytes == file.stat().st_size


def test_damaged_files_and_full_disks_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="bad.safetensors: the switched sets cannot be read"):
        SwitchedSets(tmp_path / "bad.safetensors", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the switched sets could not be written"):
        write_sets(tmp_path / "file" / "x.safetensors", [{"m": {"b": torch.zeros(1)}}])
