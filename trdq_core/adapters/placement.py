"""What can be told of a transformer from its configuration alone: its linears, and what of it will not be quantized."""

from __future__ import annotations

from pathlib import Path

import diffusers
from torch import nn

from trdq_core.adapters.families import family_of
from trdq_core.adapters.folder import check_folder
from trdq_core.adapters.pipelines import transformer_from_config
from trdq_core.adapters.roles import find_linears
from trdq_core.errors import ModelError
from trdq_core.plan import LayerInfo

_MUCH = 0.05  # share of a transformer's weights that is worth a word


def layers_from_config(folder: Path) -> tuple[LayerInfo, ...]:
    """The linears of the transformer in a pipeline's folder, built from its config.json on the meta device."""
    return find_linears(_transformer_of(folder))


def notes_from_config(folder: Path) -> tuple[str, ...]:
    """Sentences on what could not be placed in the transformer of a pipeline's folder."""
    return notes_on(_transformer_of(folder))


def notes_on(transformer: nn.Module) -> tuple[str, ...]:
    """Sentences on what could not be placed: weights outside of linears, linears without a role, a family never tested."""
    notes = []
    layers = find_linears(transformer)
    total = sum(one.numel() for one in transformer.parameters())
    found = {
        name: one.weight.numel()
        for name, one in transformer.named_modules()
        if isinstance(one, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    if sum(found.values()) > _MUCH * total:
        largest = max(found, key=lambda name: found[name])
        notes.append(
            f"{sum(found.values()) / total:.0%} of the transformer's weights are in {len(found)} convolutions, {largest} for "
            "instance; only linear layers are quantized, so they stay as they are."
        )
    unplaced = [layer.name for layer in layers if layer.role == "other"]
    if unplaced:
        notes.append(
            f"{len(unplaced)} linear layers could not be told from the model's structure, {unplaced[0]} for instance; they stay "
            "in full precision."
        )
    if family_of(transformer) is None:
        notes.append(
            f"{type(transformer).__name__} is of a family that was never tested here: roles come from names and structure; "
            "shared inputs, time and guidance are found in a run, before it is calibrated."
        )
    return tuple(notes)


def _transformer_of(folder: Path) -> nn.Module:
    kind = check_folder(folder, None)["transformer"][1]
    transformer = getattr(diffusers, kind, None)
    if transformer is None:
        raise ModelError(
            f"model {folder.name}: its transformer {kind} is not one of diffusers {diffusers.__version__}; update diffusers."
        )
    return transformer_from_config(folder, None, transformer)
