"""Walking and changing module trees."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; what torch itself allocates at on a CPU, and the width of its widest vectors


def share_copy(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original: costs no weight memory."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` ("blocks.0.attn.to_q") was."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, leaf, new)


@torch.no_grad()
def align(module: nn.Module) -> None:
    """Move parameters and buffers of a CPU that do not begin at a multiple of 64 bytes to memory that does.

    Tensors mapped from a file begin anywhere, and matrix products of the same numbers differ in their last bit with that:
    two copies of a model that are to agree to the bit have to be aligned alike.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes held by tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def module_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers of some modules, shared storage counted once."""
    return tensor_bytes(t for module in modules for t in (*module.parameters(), *module.buffers()))
