"""What every tool is handed and gives back, and the denoiser that stands in the pipeline for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from trdq_core.errors import PeerError, TRDQError
from trdq_core.presets import Peer

Call = dict[str, Any]  # keyword arguments of one forward call of the denoiser


class Task(NamedTuple):
    """A denoiser to convert. `denoiser` is a copy whose tensors belong to the original: replace them, never write to them."""

    peer: Peer
    denoiser: nn.Module
    layers: tuple[str, ...]  # the linears to quantize
    every: bool  # they are all that there are, and the tool may choose by itself what else it takes
    example: Call  # one call as the sampler makes it
    calls: Callable[[], Sequence[Call]]  # calls of the calibration prompts, made when asked for


class Converted(NamedTuple):
    """What a tool made. Bytes are what its tensors hold; None for weights where it quantizes nothing.

    `module` answers a call of the denoiser with a tuple, its output first. `kernels` counts the products that were seen to
    run, by the arithmetic they ran in.
    """

    module: nn.Module
    kernels: dict[str, int]
    weight_bytes: int | None
    resident_bytes: int
    file_bytes: int
    calibration_seconds: float = 0.0  # calls recorded and run for ranges, not counting what comes after


class PeerDenoiser(nn.Module):
    """Stands where the denoiser stood: the converted one computes, the original answers for config, dtype and the like."""

    def __init__(self, inner: nn.Module, original: nn.Module, name: str) -> None:
        super().__init__()
        self.inner = inner
        self._name = name
        self._original = (original,)  # in a tuple, so that its weights do not count as those of this module
        self._names = list(inspect.signature(original.forward).parameters)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_original")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            # By name, as recorded calls are: pipelines hand over the first arguments by position.
            return self.inner(**dict(zip(self._names, args, strict=False)), **kwargs)
        except TRDQError:
            raise
        except Exception as error:
            raise PeerError(f"{self._name}: it stopped while the model ran ({reason(error)}); leave it out.") from error


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of its text, short enough for a sentence."""
    lines = str(error).strip().splitlines() or ["no text"]
    return f"{type(error).__name__}: {lines[0][:200].rstrip(' .;')}"
