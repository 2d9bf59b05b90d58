"""Moving modules whose buffers must keep their dtype: scales stay fp32 when the model is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from trdq_core.errors import StorageError

_Module = TypeVar("_Module", bound=nn.Module)


def check_in_memory(buffer: Tensor | None) -> None:
    """StorageError if a buffer was offloaded and nobody brought it back: a kernel would read where there is nothing."""
    if buffer is not None and buffer.is_meta:
        raise StorageError(
            "offloading: a quantized layer was asked for its weights while they were offloaded, as attention sharing does; "
            "use enable_model_cpu_offload instead of sequential offloading."
        )


def keep_dtypes(module: _Module, fn: Callable[[Tensor], Tensor]) -> _Module:
    """Apply the device part of `fn` (what `module.to(...)` or `.half()` passes down) to the buffers, not its dtype part."""
    for child in module.children():
        child._apply(fn)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            probe = fn(torch.empty(0, device=buffer.device))
            module._buffers[name] = buffer.to(probe.device)
    return module
