"""Letting diffusers know of this library without importing it: diffusers takes seconds, a command line must not.

diffusers has no entry point for quantizers of others, only two dictionaries in one module; nor has it one for looking at a
folder before a model is built from it, or for refusing a LoRA. What is there already is changed at once, the rest right after
it was imported by whoever needs it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# A module of others, and where the function stands that is handed it as soon as it is there.
HOOKS = {
    "diffusers.quantizers.auto": ("trdq_core.adapters.quantizer", "register"),
    "diffusers.models.modeling_utils": ("trdq_core.adapters.before_loading", "guard_loading"),
    "diffusers.loaders.lora_pipeline": ("trdq_core.adapters.lora", "guard_loaders"),
    "transformers.quantizers.auto": ("trdq_core.adapters.text_models", "register"),
}
# Found by name when they are first used: what stands at the top of the import order cannot import what stands below.
EXPORTS = {
    "TRDQConfig": "trdq_core.adapters.quantizer",
    "save_quantized": "trdq_core.adapters.saving",
    "quantize": "trdq_core.saving",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module of `HOOKS` where everybody finds it, and has its function called once it is there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module with another loader, None for every other module."""
        if fullname != self.name:
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
        """See importlib; and then hands the module to its function."""
        self._inner.exec_module(module)
        _arrived(module.__name__, whole=module)

    def __getattr__(self, name: str) -> object:  # source and file name, for inspect
        return getattr(self._inner, name)


def register_quantizer() -> None:
    """Register now with what is there, and with the rest when it comes. Harmless when done twice."""
    waited_for = {finder.name for finder in sys.meta_path if isinstance(finder, _Finder)}
    ours = dict.fromkeys(where for where, _ in HOOKS.values())
    for name in (*HOOKS, *ours):
        if name in sys.modules:
            _arrived(name)
        elif name not in waited_for:
            sys.meta_path.insert(0, _Finder(name))


def exported(name: str) -> object:
    """A public name of the library, imported now; AttributeError if there is none such."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'trdq_core' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)


def _arrived(name: str, whole: ModuleType | None = None) -> None:
    """Hand over what has become possible with the module `name`, one of `HOOKS` or one with a function of theirs.

    Either may import the other: then the one that was begun first is whole last, and that is when they are brought together.
    `whole` is that module, of which the import system does not say so yet.
    """
    for other, (where, function) in HOOKS.items():
        module = sys.modules.get(other)
        if name not in (other, where) or module is None or not (module is whole or _is_whole(module)):
            continue
        act = getattr(importlib.import_module(where), function, None)
        if act is not None:
            act(module)


def _is_whole(module: ModuleType) -> bool:
    return not getattr(module.__spec__, "_initializing", False)
