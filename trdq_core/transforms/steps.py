"""A recipe's transform steps made concrete for one layer: which rotation, in which blocks, and what they weigh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from trdq_core.errors import ShapeError
from trdq_core.specs import TransformSpec
from trdq_core.transforms.rotation import choose_block

ROTATIONS = ("greedy_rotation", "hadamard")
HADAMARD_BLOCKS = (32, 64, 128, 256)  # what the kernels run


class TransformPrice(NamedTuple):
    """What one set of a transform keeps in memory, and its words for tables, as `InputTransform.describe` gives them."""

    nbytes: int
    words: str


def input_rms(rows: Tensor) -> float:
    """J = ||X||_F / sqrt(N C) of input rows (N, C) before any smoothing: how rough an input is (LRQ-DiT, arXiv 2508.03485)."""
    return float(rows.double().square().mean().sqrt())


def resolve_adaptive(specs: Sequence[TransformSpec], rows: Tensor) -> tuple[TransformSpec, ...]:
    """`specs` with an adaptive rotation replaced by the steps that the input's RMS asks for.

    Below the threshold the input is calm and a block Hadamard does; from the threshold on, two greedy rotations around a
    permutation. Where there are several time groups give the rows (N, channels) of all of them: one input keeps one kind of
    rotation, else its sets could not be stacked.
    """
    adaptive = next((spec for spec in specs if spec.kind == "adaptive_rotation"), None)
    if adaptive is None:
        return tuple(specs)
    return _chosen(specs, calm=input_rms(rows) < adaptive.threshold)


def step_blocks(
    specs: Sequence[TransformSpec], channels: int, out_features: int, *, layer: str = "input", piece: str = "hadamard"
) -> list[int]:
    """The block size of every step, 0 for smoothing; `out_features` are those of all linears that read the input.

    Dense rotations are as large as their bytes and work allow, a Hadamard takes 128 or the largest power of two below that
    divides the width; `block` in a step overrides that, up to 256. A permutation deals to the blocks that the next rotation
    mixes. ShapeError names `layer` if a block does not divide the width or no kernel runs it, and the `piece` of the recipe
    that asked for a Hadamard.
    """
    blocks: list[int] = []
    for index, spec in enumerate(specs):
        if spec.kind == "smooth":
            blocks.append(0)
            continue
        mixing = next(
            (s for s in specs[index:] if s.kind in ROTATIONS), next((s for s in specs if s.kind in ROTATIONS), spec)
        )
        wanted = mixing.block if spec.block is None else spec.block
        block = choose_block(channels, out_features, wanted, dense=mixing.kind == "greedy_rotation", layer=layer)
        if spec.kind == "hadamard" and block not in HADAMARD_BLOCKS:
            raise ShapeError(_no_hadamard(layer, block, channels, piece))
        blocks.append(block)
    return blocks


def price(
    specs: Sequence[TransformSpec], channels: int, out_features: int, *, layer: str = "input", piece: str = "hadamard"
) -> TransformPrice:
    """Bytes and words of the transform that `specs` will become, without any data.

    An adaptive rotation is priced as the dearer of its two choices. A scale that a search may leave out is counted.
    """
    if any(spec.kind == "adaptive_rotation" for spec in specs):
        calm, rough = (
            price(_chosen(specs, calm=calm), channels, out_features, layer=layer, piece="adaptive_rotation")
            for calm in (True, False)
        )
        return TransformPrice(max(calm.nbytes, rough.nbytes), f"{calm.words} or {rough.words}")
    blocks = step_blocks(specs, channels, out_features, layer=layer, piece=piece)
    total, words, signed = 0, [], False
    for spec, block in zip(specs, blocks, strict=True):
        if spec.kind == "smooth":
            total, words = total + 4 * channels, [*words, "scale"]
        elif spec.kind == "serpentine":
            total, words = total + 4 * channels, [*words, "permute"]
        elif spec.kind == "greedy_rotation":
            total, words = total + 2 * block * block, [*words, f"R{block}"]
        else:
            # Random signs stand in the scale, or in the rotation before the Hadamard where there is one.
            signed = spec.random_signs and not any(word.startswith("R") for word in words)
            words.append(f"H{block}")
    if signed and "scale" not in words:
        total += 4 * channels
    if signed:
        words.insert(1 if words[0] == "scale" else 0, "signs")
    return TransformPrice(total, ", ".join(words) or "none")


def _chosen(specs: Sequence[TransformSpec], *, calm: bool) -> tuple[TransformSpec, ...]:
    """`specs` with the adaptive rotation replaced by what it chooses for a calm or a rough input."""
    chosen: list[TransformSpec] = []
    for spec in specs:
        if spec.kind != "adaptive_rotation":
            chosen.append(spec)
        elif calm:
            chosen.append(dataclasses.replace(spec, kind="hadamard"))
        else:
            greedy = dataclasses.replace(spec, kind="greedy_rotation", random_signs=False)
            chosen += [greedy, dataclasses.replace(greedy, kind="serpentine"), greedy]
    return tuple(chosen)


def _no_hadamard(layer: str, block: int, channels: int, piece: str) -> str:
    allowed = ", ".join(str(size) for size in HADAMARD_BLOCKS if channels % size == 0)
    if not allowed:
        return f"{layer}: {channels} channels do not split into Hadamard blocks of 32 to 256; leave {piece} out for it."
    return f"{layer}: got a Hadamard block of {block}, which no kernel runs; for {channels} channels use {allowed}."
