"""Weights for the squared output error of linears: how much the denoiser's prediction depends on each output.

The Gauss-Newton diagonal of ||change of the prediction||^2 with regard to the outputs y of a linear is E[g^2] with
g = d<prediction, v>/dy and random signs v (Hutchinson). TQ-DiT scores scales with such squared gradients too, but takes them
from the divergence between the prediction and itself, whose gradient is zero in full precision; this one's is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trdq_core.errors import CalibrationError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.sampling import SampledModel, sample
from trdq_core.scale_search import OutputSamples
from trdq_core.statistics import FP16_MAX
from trdq_core.timegroups import TimeArgument, time_argument

CALLS = 32  # denoiser calls that are replayed with gradients, at most


class Call(NamedTuple):
    """The arguments of one denoiser call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def output_weights(
    model: SampledModel,
    about: Mapping[str, Any],
    layers: Sequence[str],
    *,
    rows: int = 512,
    probes: int = 4,
    seed: int = 0,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, OutputSamples]:
    """Samples of the linears named in `layers`: at most `rows` rows each, spread over the calibration's timesteps.

    `about` is what `Statistics.about` holds: prompts, steps, guidance, seed. Linears that read one tensor get the same rows.
    Every result follows from `seed`. Parameters take no gradient; the memory is that of one call's activations.
    """
    if rows < 1 or probes < 1:
        raise CalibrationError(f"output weights: got {rows} rows and {probes} probes; give at least one of each.")
    total = len(about["prompts"]) * about["steps"]
    chosen = _spread(len(about["prompts"]), about["steps"], min(CALLS, rows, total))
    calls = _record(model, about, chosen, on_event, cancelled)
    progress = Progress("observe", len(calls), on_event=on_event, cancelled=cancelled)
    per_call = math.ceil(rows / len(calls))
    parts: dict[str, list[OutputSamples]] = {name: [] for name in layers}
    for index, call in enumerate(calls):
        found = replay(
            model.denoiser, call, layers, rows=per_call, probes=probes, seed=seed + index,
            argument=model.timestep_argument,
        )  # fmt: skip
        for name, samples in found.items():
            parts[name].append(samples)
        progress.advance()
    joined = {
        name: OutputSamples(*(torch.cat(field)[:rows] for field in zip(*samples, strict=True)))
        for name, samples in parts.items()
        if samples
    }
    if missing := [name for name in layers if name not in joined]:
        raise CalibrationError(f"{missing[0]}: the denoiser never calls this layer; leave it in full precision.")
    return {name: _scorable(samples) for name, samples in joined.items()}


def replay(
    denoiser: nn.Module,
    call: Call,
    layers: Sequence[str],
    *,
    rows: int,
    probes: int,
    seed: int,
    argument: TimeArgument | str = "timestep",
) -> dict[str, OutputSamples]:
    """One call of the denoiser again, with gradients: for each layer it calls, `rows` random tokens (all, if fewer)."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.enable_grad(), _watching(denoiser, layers, seen):
        prediction = _prediction(denoiser(*call.args, **call.kwargs), call)
    if not seen:
        return {}
    generator = torch.Generator().manual_seed(seed)
    tokens = {name: _tokens(len(x), rows, seed) for name, (x, _) in seen.items()}
    sums = {name: torch.zeros(len(tokens[name]), y.shape[-1]) for name, (_, y) in seen.items()}
    outputs = [y for _, y in seen.values()]
    for probe in range(probes):
        signs = torch.randint(2, prediction.shape, generator=generator).mul_(2).sub_(1)
        loss = (prediction.float() * signs.to(prediction.device)).sum()
        gradients = torch.autograd.grad(loss, outputs, retain_graph=probe + 1 < probes, allow_unused=True)
        for name, gradient in zip(seen, gradients, strict=True):
            if gradient is not None:  # an output that nothing depends on
                sums[name] += gradient.flatten(0, -2)[tokens[name]].float().square().cpu()
    timestep = time_argument(argument).value(call.args, call.kwargs)
    return {
        name: OutputSamples(
            x[tokens[name].to(x.device)].clamp(-FP16_MAX, FP16_MAX).half().cpu(),
            sums[name] / probes,
            torch.full((len(tokens[name]),), timestep),
        )
        for name, (x, _) in seen.items()
    }


def _spread(prompts: int, steps: int, count: int) -> set[tuple[int, int]]:
    """`count` pairs of prompt and step, evenly over the steps, the prompts in turns."""
    # Fewer than `prompts` calls in a row share a step, so taking the prompts in turns never repeats a pair.
    return {(i % prompts, (2 * i + 1) * prompts * steps // (2 * count) // prompts) for i in range(count)}


def _record(
    model: SampledModel,
    about: Mapping[str, Any],
    chosen: set[tuple[int, int]],
    on_event: OnEvent,
    cancelled: Callable[[], bool] | None,
) -> list[Call]:
    """Sample the prompts of the `chosen` calls in full precision and keep what those calls were given."""
    calls: list[Call] = []
    prompts = sorted({prompt for prompt, _ in chosen})
    progress = Progress("observe", len(prompts) * about["steps"], on_event=on_event, cancelled=cancelled)
    position = [0, 0]  # prompt, call within it

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tuple(position) in chosen:
            calls.append(Call(_detached(args), _detached(kwargs)))
        position[1] += 1

    handle = model.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        encoded = model.encode(about["prompts"])
        for prompt in prompts:
            position[:] = [prompt, 0]
            sample(
                model,
                encoded[prompt],
                about["seed"] + prompt,
                steps=about["steps"],
                guidance=about["guidance"],
                on_step=lambda step, timestep, latents, c=encoded[prompt]: progress.advance(c.prompt),
            )
    finally:
        handle.remove()
    return calls


@contextmanager
def _watching(denoiser: nn.Module, layers: Sequence[str], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put each layer's input rows (tokens, in) and its output into `seen`; outputs carry gradients inside."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Outputs of what depends on the timestep or the text alone have no gradient by themselves. The copy is no
            # leaf, so that later layers may write into it.
            y = output if output.requires_grad else output.detach().requires_grad_().clone()
            seen[name] = (args[0].detach().flatten(0, -2), y)
            return y

        return hook

    handles = [denoiser.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prediction(output: Any, call: Call) -> Tensor:
    """The part of the denoiser's output that a sampler uses: a learned variance, channels beyond those of the latents, is not."""
    value = _stacked(output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output))
    tensors = (_stacked(part) for part in (*call.args, *call.kwargs.values()))
    latents = next(part for part in tensors if isinstance(part, Tensor) and part.dim() == value.dim())
    return value[:, : latents.shape[1]]


def _stacked(value: Any) -> Any:
    """Items that a denoiser takes or gives as a list, as one tensor."""
    return torch.stack(value) if isinstance(value, list) and value and isinstance(value[0], Tensor) else value


def _tokens(count: int, rows: int, seed: int) -> Tensor:
    """Random tokens, the same for every layer with as many: linears that read one tensor are scored together."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:rows].sort().values


def _scorable(samples: OutputSamples) -> OutputSamples:
    """Samples whose weights tell grids apart: where the prediction depends on nothing, every output counts the same."""
    if not torch.isfinite(samples.weight).all():
        raise CalibrationError("output weights: gradients are not finite; the weights hold NaN or infinity.")
    return samples if samples.weight.any() else samples._replace(weight=torch.ones_like(samples.weight))


def _detached(value: Any) -> Any:
    """A copy of call arguments that nothing else writes into."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(part) for part in value)
    if isinstance(value, Mapping):
        return {key: _detached(part) for key, part in value.items()}
    return value
