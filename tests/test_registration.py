"""Waiting for diffusers without importing it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import trdq_core
from trdq_core import registration
from trdq_core.registration import REGISTRY, exported, register_quantizer


@pytest.fixture
def without_registry(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """As if diffusers had not been imported; what is put among the finders goes again."""
    monkeypatch.delitem(sys.modules, REGISTRY, raising=False)
    finders = [finder for finder in sys.meta_path if not isinstance(finder, registration._Finder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    return finders


def test_one_finder_waits_and_looks_at_nothing_else(without_registry: list[object]) -> None:
    register_quantizer()
    register_quantizer()
    waiting = [finder for finder in without_registry if isinstance(finder, registration._Finder)]
    assert len(waiting) == 1
    for name in ("json", "diffusers", "diffusers.quantizers", "torch"):
        assert waiting[0].find_spec(name) is None
    assert waiting[0] in without_registry


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
