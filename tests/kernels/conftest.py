"""Fixtures of the kernel tests: each fast path in turn, and 1 or 2 threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch

from tests.kernels.triton_device import DEVICE
from trdq_core.kernels import cpu, native, torch_eager, triton_gpu


@pytest.fixture(params=["torch", "avx512-vnni", "avx2", "portable"])
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """A module with the signatures of `reference`: torch, and the C++ one with each path that this CPU has."""
    if request.param == "torch":
        yield torch_eager
        return
    with _limited(request.param):
        yield cpu


@pytest.fixture(params=["avx512-vnni", "avx2", "portable"])
def native_backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The C++ module with each path that this CPU has."""
    with _limited(request.param):
        yield cpu


def _limited(path: native.Path) -> AbstractContextManager[None]:
    best = native.path()
    if best is None:
        pytest.skip(str(native.unavailable_reason()))
    if native.PATHS.index(path) > native.PATHS.index(best):
        pytest.skip(f"this CPU has no {path}")
    return native.limited_to(path)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more: small tensors gain nothing from a team, and a busy machine loses much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    """The thread count of the test."""
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture
def cpp() -> ModuleType:
    """The C++ backend, or a skip with the reason."""
    reason = native.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return cpu


@pytest.fixture(scope="session")
def triton() -> ModuleType:
    """The Triton backend on a GPU or in Triton's interpreter, or a skip with the reason."""
    reason = triton_gpu.unavailable_reason(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return triton_gpu
