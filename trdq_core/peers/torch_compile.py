"""The reference under torch.compile: what a person gets for one line, before anything is quantized."""

from __future__ import annotations

import torch
from torch import nn

from trdq_core.peers.base import Call, Converted, Task
from trdq_core.peers.measures import file_bytes, held_bytes


def convert(task: Task) -> Converted:
    """The denoiser compiled for the shape of the example call. Raises what the compiler raises."""
    compiled = compile_for(task.denoiser, task.example)
    dtype = str(next(task.denoiser.parameters()).dtype).removeprefix("torch.")
    linears = sum(isinstance(module, nn.Linear) for module in task.denoiser.modules())
    return Converted(
        compiled, {f"{dtype}, torch.compile": linears}, None, held_bytes(task.denoiser), file_bytes(task.denoiser)
    )


@torch.no_grad()
def compile_for(module: nn.Module, example: Call) -> nn.Module:
    """`module` compiled by Inductor, with the first call, which is when it compiles, already made."""
    compiled: nn.Module = torch.compile(module)
    compiled(**example)
    return compiled
