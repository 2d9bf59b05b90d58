"""Waiting for diffusers without importing it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import trdq_core
from trdq_core import registration
from trdq_core.registration import HOOKS, exported, register_quantizer

REGISTRY = "diffusers.quantizers.auto"


@pytest.fixture
def without_diffusers(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """As if neither the modules that are waited for nor ours had been imported; what is put among the finders goes again."""
    for name in (*HOOKS, *(where for where, _ in HOOKS.values())):
        monkeypatch.delitem(sys.modules, name, raising=False)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, registration._Finder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    return finders


def test_one_finder_waits_for_each_module_and_looks_at_nothing_else(without_diffusers: list[object]) -> None:
    register_quantizer()
    register_quantizer()
    waiting = [finder for finder in without_diffusers if isinstance(finder, registration._Finder)]
    assert sorted(finder.name for finder in waiting) == sorted({*HOOKS, *(where for where, _ in HOOKS.values())})
    for finder in waiting:
        for name in ("json", "diffusers", "diffusers.quantizers", "torch"):
            assert finder.find_spec(name) is None
        assert finder in without_diffusers


def test_a_registry_that_is_there_is_written_into_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ModuleType(REGISTRY)
    registry.AUTO_QUANTIZER_MAPPING, registry.AUTO_QUANTIZATION_CONFIG_MAPPING = {"other": int}, {"other": int}
    monkeypatch.setitem(sys.modules, REGISTRY, registry)
    register_quantizer()
    assert set(registry.AUTO_QUANTIZER_MAPPING) == set(registry.AUTO_QUANTIZATION_CONFIG_MAPPING) == {"other", "trdq"}
    assert registry.AUTO_QUANTIZATION_CONFIG_MAPPING["trdq"] is trdq_core.TRDQConfig


def test_public_names_are_found_when_they_are_asked_for() -> None:
    assert {exported(name).__name__ for name in registration.EXPORTS} == set(registration.EXPORTS)
    with pytest.raises(AttributeError, match="module 'trdq_core' has no attribute 'nothing'"):
        trdq_core.nothing
