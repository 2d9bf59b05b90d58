"""What is learned together: blocks, single linears, and what reads only the timestep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from trdq_core.nn.input_grid import InputGrid
from trdq_core.plan import LayerInfo
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.grids import WeightGrid

UnitKind = Literal["temporal", "layer", "block"]
TEMPORAL_ROLES = ("embed", "modulation")
FLOATING = InputGrid(None)  # an input that stays in floating point


@dataclass(frozen=True)
class UnitLinear:
    """One linear whose rounding is learned, as it was fitted.

    weight: (out, in) what `grid` was fitted on: T*(W), or T*(W - L) where there is a low-rank branch.
    input: the grid of T(x); its ranges are one for all time groups, or one for each.
    low_rank: L (out, in), the product of the low-rank factors, which multiplies x itself in full precision.
    """

    name: str
    transform: InputTransform
    weight: Tensor
    grid: WeightGrid
    input: InputGrid = FLOATING
    low_rank: Tensor | None = None


class Unit(NamedTuple):
    """Linears learned together: the outputs of `module` are what they are to keep."""

    kind: UnitKind
    module: str
    layers: tuple[str, ...]
    block: str | None = None  # of a linear learned alone inside a block: its inputs are found by running the block


def find_blocks(layers: Iterable[LayerInfo]) -> tuple[str, ...]:
    """The transformer blocks in model order: what is numbered and holds a self-attention, by the names of its queries.
    Blocks that attend across frames stand after all others where a model lists them apart; it calls them in turns."""
    found = (re.match(r"(.*\.\d+)\.", layer.name) for layer in layers if layer.role in ("self_q", "temporal_q"))
    return tuple(dict.fromkeys(match[1] for match in found if match))


def plan_units(
    learned: Sequence[str], blocks: Sequence[str], temporal: Sequence[Unit], unit: Literal["layer", "block"]
) -> tuple[Unit, ...]:
    """Every learned linear in exactly one unit, in model order: temporal units first, then what stands before, in and after
    the blocks. Linears outside all blocks are units of their own."""
    taken = {name for part in temporal for name in part.layers}
    units = list(temporal)
    for name in learned:
        if name in taken:
            continue
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None and unit == "block":
            members = tuple(n for n in learned if n.startswith(f"{block}.") and n not in taken)
            taken.update(members)
            units.append(Unit("block", block, members))
        else:
            units.append(Unit("layer", name, (name,), block))
    return tuple(units)
