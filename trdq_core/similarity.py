"""How alike the two guidance branches attend, and neighbouring steps are, measured while the full-precision model samples."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trdq_core import branches
from trdq_core.errors import CalibrationError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.gaps import FILES, TEMPORAL, Similarity
from trdq_core.nn.attention import check_attention
from trdq_core.nn.attention_gap import Gap, MeasuringAttention, measure_gap
from trdq_core.nn.guided_forward import first_tensor
from trdq_core.nn.modules import share_copy
from trdq_core.sampling import SampledModel, check_branches, sample
from trdq_core.sharing import self_attentions, temporal_attentions
from trdq_core.sharing_plans import plan_sharing, predict
from trdq_core.timegroups import TimeContext, TimeGroups

__all__ = [
    "FILES", "TEMPORAL", "Gap", "MeasuringAttention", "Similarity", "measure_gap", "measure_similarity", "plan_sharing",
    "predict",
]  # fmt: skip


class _Guidance:
    """A forward hook that follows the guidance direction d = conditional - unconditional of the predicted noise."""

    def __init__(self, time: TimeContext, channels: int) -> None:
        self.time, self.channels = time, channels
        self.share: dict[float, list[float]] = {}
        self.change: dict[float, list[float]] = {}  # nothing at the first step of a run
        self.call: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None  # the inputs of one call with both branches
        self._before: tuple[float, Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if branches.present().branch != "joint":
            return
        self.call = self.call or (args, kwargs)
        # Models that learn the variance too return it as further channels, which guidance does not use.
        unconditional, conditional = first_tensor(output)[:, : self.channels].chunk(2)
        direction, timestep = conditional - unconditional, self.time.timestep
        self.share.setdefault(timestep, []).append(float(direction.norm() / conditional.norm()))
        if self._before is not None and timestep < self._before[0]:
            change = float((direction - self._before[1]).norm() / direction.norm())
            self.change.setdefault(timestep, []).append(change)
        self._before = (timestep, direction)


@torch.no_grad()
def denoiser_flops(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Floating-point operations of one call, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernels of a CPU are not counted
        denoiser(*args, **kwargs)
    return counter.get_total_flops()


def measure_similarity(
    model: SampledModel,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> Similarity:
    """Sample every prompt in full precision and compare both branches' self-attention in every block and step, and each
    step with the one before. Of models of clips that is the attention within frames; `temporal` holds that across them.

    The pictures are those of plain sampling: the measures are computed beside it.
    """
    if not prompts or guidance <= 1:
        raise CalibrationError(
            "similarity: it takes at least one prompt and a guidance above 1, else there is one branch."
        )
    check_branches(model)
    started = time.monotonic()
    denoiser, context = share_copy(model.denoiser), TimeContext(TimeGroups())
    context.attach(denoiser, model.timestep_argument)
    guidance_hook = _Guidance(context, model.initial_latents(seed).shape[1])
    denoiser.register_forward_hook(guidance_hook, with_kwargs=True)
    spatial, temporal = (
        _measured(denoiser, names(model.linears()), context) for names in (self_attentions, temporal_attentions)
    )
    progress = Progress("attention", len(prompts) * steps, on_event=on_event, cancelled=cancelled)
    with model.using(denoiser):
        for index, conditioning in enumerate(model.encode(prompts)):
            sample(
                model, conditioning, seed + index, steps=steps, guidance=guidance,
                on_step=lambda step, timestep, latents, c=conditioning: progress.advance(c.prompt),
            )  # fmt: skip
    about = {
        "model": model.name, "prompts": list(prompts), "steps": steps, "guidance": guidance, "seed": seed,
        "dtype_bytes": model.dtype.itemsize,
        "denoiser_flops": denoiser_flops(model.denoiser, *guidance_hook.call) if guidance_hook.call else None,
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    found = _collect(spatial, guidance_hook, about, "frames")
    return replace(found, temporal=_collect(temporal, guidance_hook, about, "patches")) if temporal else found


def _measured(denoiser: nn.Module, names: Sequence[str], time: TimeContext) -> dict[str, MeasuringAttention]:
    """Processors that measure, put into the attentions of these names."""
    processors = {}
    for name in names:
        attention = denoiser.get_submodule(name)
        check_attention(name, attention)
        processors[name] = MeasuringAttention(attention.processor, time)
        attention.set_processor(processors[name])
    return processors


def _collect(
    measured: Mapping[str, MeasuringAttention], guidance: _Guidance, about: Mapping[str, Any], parts: str
) -> Similarity:
    """The measures of some attentions; `parts` is what they look at one by one."""
    processors = list(measured.values())
    timesteps, first = tuple(processors[0].seen), processors[0]
    about = {**about, "blocks": list(measured), "tokens": first.tokens, parts: first.parts, "channels": first.channels}

    def mean(measure: Callable[[Gap], Tensor]) -> Tensor:
        cells = [
            [torch.stack([measure(gap) for gap in processor.seen[t]]).mean(0) for processor in processors]
            for t in timesteps
        ]
        return torch.stack([torch.stack(row) for row in cells]).float()

    moved = [_over_time(processor.moved, timesteps) for processor in processors]
    return Similarity(
        timesteps, mean(Gap.map_cosine), mean(Gap.output_error), mean(Gap.block_error), about,
        step_error=torch.stack(moved, 1),
        guidance_change=_over_time(guidance.change, timesteps),
        guidance_share=_over_time(guidance.share, timesteps),
    )  # fmt: skip


def _over_time(found: Mapping[float, Sequence[float]], timesteps: Sequence[float]) -> Tensor:
    """Means over prompts (timesteps,); NaN where nothing was found, at the first step."""
    return torch.tensor([torch.tensor(found.get(t, [])).mean() for t in timesteps])
