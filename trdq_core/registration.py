"""Letting diffusers know of this library's quantizer without importing it: diffusers takes seconds, a command line must not.

diffusers has no entry point for quantizers of others, only two dictionaries in one module. If that module is there already,
it is written into at once, else right after it was imported by whoever needs it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "diffusers.quantizers.auto"
NAME = "trdq"
# Found by name when they are first used: what stands at the top of the import order cannot import what stands below.
EXPORTS = {
    "TRDQConfig": "trdq_core.adapters.quantizer",
    "save_quantized": "trdq_core.adapters.saving",
    "quantize": "trdq_core.saving",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the registry where everybody finds it, and has it written into once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the registry with another loader, None for every other module."""
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)  # once; and the search below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See importlib."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See importlib; and then registers."""
        self._inner.exec_module(module)
        _write(module)

    def __getattr__(self, name: str) -> object:  # source and file name, for inspect
        return getattr(self._inner, name)


def register_quantizer() -> None:
    """Register now if diffusers is there, else when it comes. Harmless when done twice."""
    module = sys.modules.get(REGISTRY)
    if module is not None:
        _write(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def exported(name: str) -> object:
    """A public name of the library, imported now; AttributeError if there is none such."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'trdq_core' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)


def _write(registry: ModuleType) -> None:
    ours = importlib.import_module("trdq_core.adapters.quantizer")
    registry.AUTO_QUANTIZER_MAPPING[NAME] = ours.TRDQQuantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = ours.TRDQConfig
