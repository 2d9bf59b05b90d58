"""Quantized attention products in a whole denoiser: a pass that samples their operands, the search, and putting them in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trdq_core.attention_search import OperandSamples, search_grids
from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.kernels import dispatch
from trdq_core.nn.attention import Map
from trdq_core.nn.fused import FusedAttention
from trdq_core.nn.modules import share_copy
from trdq_core.nn.quantized_attention import AttentionGrids, ObservedAttention, QuantizedAttention, check_products
from trdq_core.plan import LayerInfo
from trdq_core.sampling import SampledModel, sample
from trdq_core.specs import AttentionSpec
from trdq_core.timegroups import TimeContext, TimeGroups

SAMPLES = 32  # items kept of one attention, as TQ-DiT keeps them; spread evenly over the time groups
SAMPLES_OF_GROUP = 4  # at least that many of each
ROWS = 16  # queries of a sample
KEYS = 256  # keys and values of a sample; where there are more, that many are drawn
NO_ATTENTION = "attention: this model has no attention whose products can be quantized; leave it out."
HIDDEN = -1000.0  # a mask that adds less leaves a probability of exactly zero in fp32


class OperandSampler:
    """Sees the operands of every call of one attention and keeps a random sample of them, the same size however many come.

    Each time group has a reservoir of its own (Vitter's algorithm R), so that no group goes without.
    """

    def __init__(self, name: str, time: TimeContext, seed: int) -> None:
        self.name, self._time = name, time
        # The name, not a position, so that leaving an attention out changes no other; hash() differs between processes.
        self._generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        self._size = max(SAMPLES_OF_GROUP, SAMPLES // time.groups.count)
        self._kept: list[list[tuple[float, tuple[Tensor, ...]]]] = [[] for _ in range(time.groups.count)]
        self._seen = [0] * time.groups.count
        self._absmax: Tensor | None = None

    def observe(self, source: Map, values: Tensor) -> None:
        """Take in one call's operands (batch, heads, tokens, width)."""
        q, k, mask = source
        visible = torch.ones(len(k), 1, k.shape[2], dtype=torch.bool, device=k.device)
        if mask is not None:
            visible = (mask > HIDDEN).any(2).any(1, keepdim=True)
            visible = visible | ~visible.any(-1, keepdim=True)  # equal offsets everywhere hide nothing
        shown = visible[..., None]
        absmax = torch.stack([q.abs().amax((0, 2, 3)), *((x * shown).abs().amax((0, 2, 3)) for x in (k, values))])
        absmax = absmax.float().cpu()
        if not torch.isfinite(absmax).all():
            raise CalibrationError(
                f"{self.name}: its queries, keys or values are not finite at timestep {self._time.timestep:g}; "
                "the weights hold NaN or infinity, load an undamaged model."
            )
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)
        for item in range(len(q)):
            place = self._place()
            if place is not None:
                bias = None if mask is None else mask[item]
                kept = self._draw(q[item], k[item], values[item], bias, visible[item, 0])
                reservoir = self._kept[self._time.group]
                reservoir[place : place + 1] = [(self._time.timestep, kept)]

    def samples(self) -> OperandSamples:
        """What was kept, group after group."""
        kept = [sample for reservoir in self._kept for sample in reservoir]
        if not kept or self._absmax is None:
            raise CalibrationError(f"{self.name}: this attention was never called; leave it out or calibrate again.")
        keys = max(parts[1].shape[1] for _, parts in kept)
        wide = [
            (q, *(nn.functional.pad(x, (0, 0, 0, keys - x.shape[1])) for x in (k, v)),
             nn.functional.pad(probabilities, (0, keys - probabilities.shape[2])))
            for _, (q, k, v, probabilities) in kept
        ]  # fmt: skip
        stacked = (torch.stack(parts) for parts in zip(*wide, strict=True))
        return OperandSamples(*stacked, tuple(timestep for timestep, _ in kept), self._absmax)

    def _place(self) -> int | None:
        """Where in the present group's reservoir the next item goes, None if it is not kept."""
        group = self._time.group
        self._seen[group] += 1
        if len(self._kept[group]) < self._size:
            return len(self._kept[group])
        place = int(torch.randint(self._seen[group], (), generator=self._generator))
        return place if place < self._size else None

    def _draw(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some queries of one item (heads, tokens, width), their probabilities over all its keys, and some of the keys."""
        rows = self._choose(torch.arange(q.shape[1]), ROWS).to(q.device)
        scores = q[:, rows].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + (bias[:, rows] if bias.shape[1] > 1 else bias)
        keys = self._choose(visible.nonzero()[:, 0].cpu(), KEYS).to(q.device)
        operands = (x.half().cpu() for x in (q[:, rows], k[:, keys], v[:, keys]))
        return (*operands, scores.softmax(-1)[:, :, keys].cpu())

    def _choose(self, indices: Tensor, count: int) -> Tensor:
        if len(indices) <= count:
            return indices
        return indices[torch.randperm(len(indices), generator=self._generator)[:count]].sort().values


@dataclass(frozen=True)
class QuantizedProducts:
    """What `apply_attention` installed: the processors by the name of their attention."""

    processors: Mapping[str, QuantizedAttention]

    @property
    def kernels(self) -> dict[str, int]:
        """None runs in an integer kernel."""
        return {}

    def facts(self) -> dict[str, Any]:
        """For reports: bits, thresholds by attention and time group, calls; always simulated."""
        grids = {name: processor.grids for name, processor in self.processors.items()}
        first = next(iter(grids.values()), None)
        return {
            "attentions": len(grids),
            "bits": first.bits if first else None,
            "softmax_bits": first.softmax_bits if first else None,
            "softmax_grid": "twin_region" if first and first.thresholds else "uniform",
            "edges": list(first.groups.edges) if first else [],
            "thresholds": {name: list(grid.thresholds) for name, grid in grids.items() if grid.thresholds},
            "calls": sum(processor.calls for processor in self.processors.values()),
            "simulated": True,
        }


@dataclass(frozen=True)
class LiveProducts:
    """What `use_int8_attention` found: the fused processors by the name of their attention, out of `asked` attentions."""

    fused: Mapping[str, FusedAttention]
    asked: int
    processors: Mapping[str, QuantizedAttention] = field(default_factory=dict)  # none: there are no grids to store

    @property
    def kernels(self) -> dict[str, int]:
        """How many attentions run in the int8 kernel, under its name; nothing where none does."""
        return {dispatch.int8_attention_name(): len(self.fused)} if self.fused else {}

    def facts(self) -> dict[str, Any]:
        """For reports: how many of the attentions asked for run in int8, the others being exact, and their int8 calls."""
        return {
            "attentions": len(self.fused),
            "exact": self.asked - len(self.fused),
            "bits": 8,
            "softmax_bits": 8,
            "softmax_grid": "uniform",
            "calls": sum(processor.int8_calls for processor in self.fused.values()),
            "simulated": False,
        }


def use_int8_attention(denoiser: nn.Module, layers: Iterable[LayerInfo], spec: AttentionSpec) -> LiveProducts:
    """Int8 products in the attentions of `denoiser` that were fused before; the others stay exact. Give it a copy."""
    names = attentions(layers, cross=spec.cross)
    if not names:
        raise RecipeError(NO_ATTENTION)
    found = {name: getattr(denoiser.get_submodule(name), "processor", None) for name in names}
    fused = {
        name: processor
        for name, processor in found.items()
        if isinstance(processor, FusedAttention) and processor.on_cpu(denoiser.get_submodule(name))
    }
    for processor in fused.values():
        processor.bits = 8
    return LiveProducts(fused, len(names))


def attentions(layers: Iterable[LayerInfo], *, cross: bool) -> list[str]:
    """Names of the self-attention modules in model order, those over frames too; with `cross` of the cross-attention modules."""
    roles = ("self_q", "temporal_q", "cross_q") if cross else ("self_q", "temporal_q")
    return [layer.name.rpartition(".")[0] for layer in layers if layer.role in roles]


@torch.no_grad()
def fit_attention(
    model: SampledModel,
    spec: AttentionSpec,
    about: Mapping[str, Any],
    groups: TimeGroups,
    *,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, AttentionGrids]:
    """A second pass in full precision over the calibration's prompts, then the search: grids by the name of the attention.

    `about` is what `Statistics.about` holds: prompts, steps, guidance, seed. The denoiser itself is left alone.
    """
    names = attentions(model.linears(), cross=spec.cross)
    if not names:
        raise RecipeError(NO_ATTENTION)
    denoiser = share_copy(model.denoiser)
    time = TimeContext(groups if spec.per_time_group else TimeGroups())
    time.attach(denoiser, model.timestep_argument)
    samplers = {name: OperandSampler(name, time, about["seed"]) for name in names}
    for name, sampler in samplers.items():
        attention = denoiser.get_submodule(name)
        check_products(name, attention)
        attention.set_processor(ObservedAttention(attention.processor, sampler.observe))
    progress = Progress("observe", len(about["prompts"]) * about["steps"], on_event=on_event, cancelled=cancelled)
    with model.using(denoiser):
        for index, conditioning in enumerate(model.encode(about["prompts"])):
            sample(
                model,
                conditioning,
                about["seed"] + index,
                steps=about["steps"],
                guidance=about["guidance"],
                on_step=lambda step, timestep, latents, c=conditioning: progress.advance(c.prompt),
            )
    progress = Progress("fit", len(names), on_event=on_event, cancelled=cancelled)
    grids = {}
    for name in names:
        samples = samplers.pop(name).samples()
        moved = (x.to(model.device) if isinstance(x, Tensor) else x for x in samples)
        grids[name] = search_grids(OperandSamples(*moved), spec, time.groups)
        progress.advance(name)
    return grids


def apply_attention(denoiser: nn.Module, grids: Mapping[str, AttentionGrids], time: TimeContext) -> QuantizedProducts:
    """Quantize the products of the attentions named in `grids` from now on. Give it a copy: its processors are replaced.

    `time` has to follow the denoiser's timestep; its own groups need not be those of the grids.
    """
    processors = {}
    time.followed = time.followed or any(grid.groups.count > 1 for grid in grids.values())
    for name, grid in grids.items():
        attention = denoiser.get_submodule(name)
        check_products(name, attention)
        if grid.heads != attention.heads:
            raise CalibrationError(
                f"{name}: got attention grids of {grid.heads} heads for {attention.heads}; calibrate this model again."
            )
        processors[name] = QuantizedAttention(grid, time)
        attention.set_processor(processors[name])
    return QuantizedProducts(processors)
