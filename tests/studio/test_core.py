"""The installed core's words for the machine: the backend of the device that runs the models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio.services import core as module
from studio.services.core import InstalledCore
from trdq_core.kernels import dispatch


def loaded(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> tuple[InstalledCore, list[Any]]:
    """A core that was loaded on a machine with or without a GPU, and the devices that it asked about."""
    asked: list[Any] = []

    def describe(device: Any = None) -> dict[str, Any]:
        asked.append(device)
        return {"backend": "triton" if device is not None else "cpp", "vectorised": True}

    fake = SimpleNamespace(is_available=lambda: cuda, get_device_name=lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(dispatch, "describe", describe)
    core = InstalledCore()
    core.load()
    return core, asked


def test_on_a_gpu_the_header_names_the_gpus_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    core, asked = loaded(monkeypatch, cuda=True)
    assert asked == [torch.device("cuda", 0)]
    assert (core.gpu_name(), core.backend_label()) == ("NVIDIA H200", "Triton")


def test_on_a_cpu_it_names_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    core, asked = loaded(monkeypatch, cuda=False)
    assert asked == [None]
    assert (core.gpu_name(), core.backend_label()) == ("", "C++, AVX512-VNNI")


def test_a_gpu_that_is_lent_by_the_call_is_not_tried_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    core, asked = loaded(monkeypatch, cuda=True)
    assert not asked
    assert core.backend_label() == module.ON_LENT_GPU
