"""The projection of the text, which a quantized denoiser need not compute at each step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trdq_core.nn.fused import fusion_is_off, hooked
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.remembered import Remembered

# Where diffusers' denoisers keep the module that sees nothing but the text.
NAMES = ("caption_projection", "context_embedder", "txt_in")


class TextProjection:
    """Stands in for `forward` of an unquantized module that makes of the text what all blocks read."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.plain, self.memory = module, module.forward, Remembered()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module makes of its one tensor; with other arguments it is asked each time."""
        alone = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        if not alone or fusion_is_off() or hooked(*self.module.modules()):
            return self.plain(*args, **kwargs)
        x, weights = args[0], tuple(self.module.parameters())
        versions = tuple(weight._version for weight in weights if not weight.is_inference())
        found = self.memory.find(x, versions, *weights)
        if found is not None:
            return found[0]
        y = self.plain(x)
        if isinstance(y, Tensor):
            self.memory.keep(x, versions, (y,), *weights)
        return y


def remember_text(denoiser: nn.Module) -> None:
    """Let the text projection of a denoiser remember what it made. One with quantized linears is left as it is."""
    for name in NAMES:
        module = getattr(denoiser, name, None)
        if isinstance(module, nn.Module) and not any(isinstance(part, QuantizedLinear) for part in module.modules()):
            module.forward = TextProjection(module)
