"""A stand-in for another tool: a module of trdq_core.peers whose convert does what a test says. No package is needed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch

from trdq_core.peers.base import Converted, Task
from trdq_core.peers.measures import file_bytes, held_bytes, weight_bytes
from trdq_core.presets import Peer
from trdq_core.presets import peers as catalogue


def install(monkeypatch: pytest.MonkeyPatch, name: str, convert: Callable[[Task], Converted], **fields: object) -> None:
    """Make `peer-NAME` a tool that converts with `convert`."""
    peer = Peer(
        name, f"fake_{name}", f"A stand-in called {name}.", **{"weight_bits": 8, "activation_bits": 8, **fields}
    )
    monkeypatch.setitem(catalogue.PEERS, name, peer)
    module = types.ModuleType(f"trdq_core.peers.fake_{name}")
    module.convert = convert
    monkeypatch.setitem(sys.modules, module.__name__, module)


def rounded(task: Task) -> Converted:
    """Weights rounded to 8 bits and multiplied in floating point, which any machine can do."""
    for name in task.layers:
        layer = task.denoiser.get_submodule(name)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        levels = (layer.weight.detach() / scale).round()
        layer.weight = torch.nn.Parameter(levels * scale, requires_grad=False)
    return Converted(
        task.denoiser,
        {"a stand-in": len(task.layers)},
        weight_bytes(task.denoiser, task.layers),
        held_bytes(task.denoiser),
        file_bytes(task.denoiser),
    )


def broken(task: Task) -> Converted:
    """A tool that cannot."""
    raise ValueError("no kernel for this\nand a second line")
