"""A whole PixArt-XL step on a GPU: bf16 against quantized, eager, compiled and as a CUDA graph; `gpu_kernels` calls it.

28 layers of width 1152, 4096 tokens (1024 x 1024 pixels), both guidance branches in one batch, random weights: what is
shown is time and memory, never quality.
"""

from __future__ import annotations

import copy
import datetime
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from benchmarks.sharing import made_up_statistics
from trdq_core import branches
from trdq_core.adapters.roles import find_linears
from trdq_core.convert import convert
from trdq_core.kernels import dispatch
from trdq_core.presets import make_recipe, with_sharing
from trdq_core.profiling import machine
from trdq_core.specs import Recipe, SharingSpec


class Size(NamedTuple):
    """The transformer's measures; the default is PixArt-XL at 1024 pixels."""

    layers: int = 28
    heads: int = 16
    head_width: int = 72
    side: int = 64  # tokens along one side
    caption_channels: int = 4096
    caption_tokens: int = 300


def build(size: Size) -> PixArtTransformer2DModel:
    """The transformer with random weights, seeded, float32 on the CPU."""
    torch.manual_seed(0)
    width = size.heads * size.head_width
    return (
        PixArtTransformer2DModel(
            num_attention_heads=size.heads, attention_head_dim=size.head_width, in_channels=4, out_channels=8,
            num_layers=size.layers, cross_attention_dim=width, sample_size=2 * size.side, patch_size=2,
            caption_channels=size.caption_channels, use_additional_conditions=False,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One guided call: two latents, one timestep, two captions."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 2 * size.side, 2 * size.side, generator=source).repeat(2, 1, 1, 1)
    captions = torch.randn(2, size.caption_tokens, size.caption_channels, generator=source)
    return {
        "hidden_states": latents.to(device, dtype),
        "encoder_hidden_states": captions.to(device, dtype),
        "timestep": torch.full((2,), 500, device=device),
    }


def recipes(layers: int) -> dict[str, Recipe]:
    """What is compared: a Hadamard rotation before every linear at two weight widths, and one with attention shared."""
    w8, w4 = (make_recipe("vidit-q", weight_bits=bits, activation_bits=8) for bits in (8, 4))
    shared = with_sharing(w8, SharingSpec(blocks=(tuple(range(layers)),)))
    return {
        "rtn-w8a8": make_recipe("rtn", weight_bits=8, activation_bits=8),
        "vidit-q-w8a8": w8,
        "vidit-q-w4a8": w4,
        "tr-dq-w8a8": make_recipe("tr-dq", weight_bits=8, activation_bits=8),
        "vidit-q-w8a8, all blocks shared": shared,
    }


def denoisers(size: Size, device: torch.device, dtype: torch.dtype, backend: dispatch.Backend) -> dict[str, nn.Module]:
    """bf16 and one for each recipe, on the device; converted on the CPU, so that the GPU holds the results alone."""
    base = build(size)
    layers = find_linears(base)
    found: dict[str, nn.Module] = {"bf16": copy.deepcopy(base).to(device, dtype)}
    for name, recipe in recipes(size.layers).items():
        made = convert(base, layers, recipe, made_up_statistics(layers), backend=backend, storage_folder=None)
        # Moving chooses kernels anew; without a GPU the interpreter has what was asked for already.
        found[name] = made.denoiser if device.type == "cpu" else made.denoiser.to(device, dtype)
    return found


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def variants(models: Mapping[str, nn.Module], call: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Every model eager and compiled with CUDA graphs ("reduce-overhead"); the compiled ones compile when first called."""
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        compiled = torch.compile(model, mode="reduce-overhead")
        calls[name] = lambda m=model: m(**call, return_dict=False)
        calls[f"{name}, compiled"] = lambda m=compiled: m(**call, return_dict=False)
    return calls


def measure_step(device: torch.device, rounds: int) -> list[dict[str, object]]:
    """Print and return the rows of results.csv: times, speed against bf16 in the same rounds, weights, failures."""
    from benchmarks.gpu_kernels import time_calls

    size = Size()
    models = denoisers(size, device, torch.bfloat16, "triton")
    call = inputs(size, device, torch.bfloat16)
    running, failures = {}, {}
    with torch.no_grad(), branches.joint():
        for name, run in variants(models, call).items():
            try:
                for _ in range(3):
                    run()
                torch.cuda.synchronize()
                running[name] = run
            except Exception as error:  # a rival that does not run is a row too
                failures[name] = f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:160]}"
        times = time_calls(running, rounds, replays=1)
    return step_rows(size, models, times, failures)


def step_rows(
    size: Size, models: Mapping[str, nn.Module], times: Mapping[str, list[float]], failures: Mapping[str, str]
) -> list[dict[str, object]]:
    """Rows of results.csv from microseconds a round; printed as they are made."""
    found = machine()
    width, tokens = size.heads * size.head_width, size.side**2
    common = {
        "date": datetime.date.today().isoformat(),
        "device": found["gpu"] or found["cpu"],
        "threads": found["threads"],
        "model": f"pixart-{size.layers}x{width}-{tokens}-tokens",
    }
    note = f"{size.layers} layers of {width}, {tokens} tokens, guidance batch 2, random weights"
    rows: list[dict[str, object]] = []
    for name, microseconds in times.items():
        ordered = sorted(value / 1000 for value in microseconds)
        last = len(ordered) - 1
        ratio = statistics.median(a / b for a, b in zip(times["bf16"], microseconds, strict=True))
        weights = tensor_bytes(models[name.removesuffix(", compiled")])
        step = {"value": round(statistics.median(ordered), 3), "low": round(ordered[round(0.1 * last)], 3)}
        alone = {"low": "", "high": ""}
        head = {**common, "recipe": name, "n": len(ordered), "note": note}
        rows.append({**head, "metric": "step_ms", **step, "high": round(ordered[round(0.9 * last)], 3)})
        rows.append({**head, "metric": "speedup", "value": round(ratio, 4), **alone})
        rows.append({**head, "metric": "weight_bytes", "value": weights, **alone})
        print(f"{name:44}{step['value']:>10.2f} ms{ratio:>8.2f} x bf16{weights / 2**20:>10.1f} MiB")
    for name, reason in failures.items():
        empty = {"metric": "step_ms", "value": "", "low": "", "high": "", "n": "", "note": f"{note}; {reason}"}
        rows.append({**common, "recipe": name, **empty})
        print(f"{name:44}{reason}")
    return rows
