"""Switched storage: the sets of all time groups in one memory-mapped file, only the active one in memory.

The exact time-grouped method at the memory of one set; sampling downwards through K groups costs K - 1 swaps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trdq_core.errors import CalibrationError, StorageError
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear

Buffers = Mapping[str, Mapping[str, Tensor]]  # module name -> buffer name -> (1, ...) tensor of one set


class SwitchedSets:
    """Swaps the buffers of quantized layers when sampling enters another time group."""

    def __init__(self, file: Path, modules: Mapping[str, nn.Module]) -> None:
        self.file = file
        self.active = 0
        self.swap_seconds: list[float] = []
        self._targets = {
            f"{name}.{key}": (module, buffer)
            for name, module in modules.items()
            for key, buffer in set_buffers(module).items()
        }
        try:
            self._stored = safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"{file.name}: the switched sets cannot be read ({error}); convert again."
            ) from error

    @property
    def nbytes(self) -> int:
        """Size of the file with all sets."""
        return self.file.stat().st_size

    def activate(self, group: int) -> None:
        """Copy the set of `group` into the layers' buffers; nothing is allocated and nothing moves."""
        if group == self.active:
            return
        started = time.perf_counter()
        for key, (_, buffer) in self._targets.items():
            buffer.copy_(self._stored.get_tensor(f"{group}.{key}"))
        for module in {id(module): module for module, _ in self._targets.values()}.values():
            module.refresh()
        self.active = group
        self.swap_seconds.append(time.perf_counter() - started)


def set_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a quantized module that differ from set to set."""
    if not isinstance(module, (QuantizedLinear, InputQuantizer)):
        return {}
    return {name: b for name, b in module.named_buffers(recurse=False) if b is not None and name != "bias"}


def write_sets(file: Path, sets: Sequence[Buffers]) -> None:
    """Write all sets into one safetensors file; StorageError if the disk is full, and then no partial file remains."""
    tensors = {
        f"{index}.{module}.{name}": tensor.contiguous()
        for index, buffers in enumerate(sets)
        for module, parts in buffers.items()
        for name, tensor in parts.items()
    }
    partial = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{file.name}: the switched sets could not be written ({error}); free some disk space."
        ) from error
