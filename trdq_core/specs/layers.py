"""What happens to a linear: the grids of its weight and input, the transform before them, a low-rank branch, the rounding."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from trdq_core.errors import RecipeError
from trdq_core.specs.base import Spec

WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
ACTIVATION_BITS = (3, 4, 5, 6, 8)

Granularity = Literal["tensor", "channel", "token", "group"]
Grid = Literal["uniform", "twin_log", "twin_region"]
Range = Literal["minmax", "mse", "percentile", "ema", "output"]
TransformKind = Literal["smooth", "greedy_rotation", "serpentine", "hadamard", "adaptive_rotation"]
Rounding = Literal["nearest", "gptq", "adaround"]

ROUNDINGS: tuple[Rounding, ...] = typing.get_args(Rounding)


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Spec):
    """One tensor's grid.

    grid: "uniform"; "twin_log", weights only: sign and levels whose distance grows exponentially (LRQ-DiT);
        "twin_region", static activations only: one step below zero and one above it, as GELU leaves them (TQ-DiT).
    granularity: weights "tensor", "channel" or "group"; activations "token", "tensor", or "group" (each token's groups).
    range: "minmax"; "mse" searches the clipping ratio (1.0 included) for the least squared error; "percentile" leaves out
        the largest values; "ema" averages static ranges over calibration items; "output" searches the scale for the least
        output error weighted by the curvature of the loss (TQ-DiT).
    clip: what ranges are multiplied with, 0.9 in QuaRot for instance. For dynamic activations range "mse" searches it
        for the least output error, one factor for each input and set.
    per_time_group: static activations have a range for each time group (TFMQ-DM).
    """

    bits: int
    grid: Grid = "uniform"
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    dynamic: bool = False
    range: Range = "minmax"
    clip: float = 1.0
    percentile: float = 99.9
    momentum: float = 0.95
    per_time_group: bool = False

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise RecipeError(f"bits: got {self.bits}; allowed are {', '.join(map(str, WEIGHT_BITS))}.")
        if (self.granularity == "group") != (self.group_size is not None):
            raise RecipeError(
                f'group_size: got {self.group_size} with granularity "{self.granularity}"; '
                'give a group_size exactly when granularity is "group".'
            )
        if self.group_size is not None and self.group_size < 2:
            raise RecipeError(f"group_size: got {self.group_size}; allowed is 2 or more.")
        if self.dynamic and self.granularity == "channel":
            raise RecipeError('dynamic: only "token", "group" or "tensor" ranges are dynamic, not "channel".')
        if not 0.1 <= self.clip <= 1:
            raise RecipeError(f"clip: got {self.clip}; allowed is 0.1 to 1.")
        if not 50 <= self.percentile <= 100:
            raise RecipeError(f"percentile: got {self.percentile}; allowed is 50 to 100.")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum: got {self.momentum}; allowed is 0 up to, not including, 1.")
        if self.grid == "twin_log" and (self.granularity != "channel" or self.dynamic):
            raise RecipeError(
                f'grid "twin_log": got granularity "{self.granularity}"; it has one grid for each output channel of a weight.'
            )
        if self.grid == "twin_region" and (self.granularity != "tensor" or self.dynamic):
            raise RecipeError(
                f'grid "twin_region": got granularity "{self.granularity}"; it is static, with one grid for a whole tensor.'
            )
        if self.per_time_group and (self.dynamic or self.granularity != "tensor"):
            raise RecipeError(
                "per_time_group: only static activation ranges, granularity tensor, differ from group to group."
            )

    @property
    def two_level(self) -> bool:
        """Group scales as small integers over one scale a channel, which the packed int4 kernel multiplies: else floats."""
        return self.granularity == "group" and self.grid == "uniform" and self.symmetric and self.bits == 4


@dataclass(frozen=True, kw_only=True)
class TransformSpec(Spec):
    """One step of the input transform. Every transform leaves the layer's output unchanged before quantization.

    smooth: x / d with d = a^alpha / w^(1-alpha), a the channel absmax of activations, w of weights. Without alpha it is
        searched for the least output error (SVDQuant, SegQuant).
    greedy_rotation: one dense n x n rotation for all blocks, fitted by greedy peak reduction (DuQuant, TR-DQ).
    serpentine: permutation dealing the channels to the blocks in order of size (DuQuant, TR-DQ).
    hadamard: normalised block Walsh-Hadamard, after random signs if asked for (QuaRot).
    adaptive_rotation: hadamard for calm inputs; greedy, serpentine, greedy for those whose RMS reaches `threshold` (LRQ-DiT).
    """

    kind: TransformKind
    alpha: float | None = 0.5
    absmax: Literal["max", "ema", "spearman"] = "max"  # how the channel absmax of calibration items are merged
    momentum: float = 0.95
    block: int | None = None  # None: the largest that divides the width and costs little (see transforms.rotation)
    steps: int = 256
    random_signs: bool = False
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha: got {self.alpha}; allowed is 0 to 1, or none to search it.")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum: got {self.momentum}; allowed is 0 up to, not including, 1.")
        if self.block is not None and (self.block < 2 or self.block & (self.block - 1)):
            raise RecipeError(f"block: got {self.block}; allowed are powers of two from 2, or none for automatic.")
        if self.steps < 1:
            raise RecipeError(f"steps: got {self.steps}; allowed is 1 or more.")
        if self.random_signs and self.kind not in ("hadamard", "adaptive_rotation"):
            raise RecipeError(f'random_signs: got it with "{self.kind}"; only a hadamard takes random signs.')
        if self.threshold < 0:
            raise RecipeError(f"threshold: got {self.threshold}; allowed is 0 or more.")


@dataclass(frozen=True, kw_only=True)
class LowRankSpec(Spec):
    """A full-precision branch of small rank that takes the largest part of the weight off the grid (SVDQuant).

    `refit` fits it once more, at the end, to what the rounding left over, in the metric of the inputs.
    """

    rank: int = 32
    iterations: int = 10  # at most; it ends when the output error grows, and the best is kept
    refit: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise RecipeError(f"rank: got {self.rank}; allowed is 1 to 1024.")
        if not 1 <= self.iterations <= 100:
            raise RecipeError(f"iterations: got {self.iterations}; allowed is 1 to 100.")


@dataclass(frozen=True, kw_only=True)
class LayerRule(Spec):
    """What happens to linears of some roles; the first rule that matches a layer wins, no rule leaves it in full precision.

    A weight without an activation is weight-only: the input stays in floating point. `alternatives` are further chains of
    transforms; each input takes the chain with the least output error on calibration rows.
    """

    roles: tuple[str, ...] = ()  # empty: every role
    match: str = "*"  # shell pattern on the layer's name
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    transforms: tuple[TransformSpec, ...] = ()
    alternatives: tuple[tuple[TransformSpec, ...], ...] = ()
    rounding: Rounding = "nearest"
    low_rank: LowRankSpec | None = None

    def __post_init__(self) -> None:
        if self.weight is None:
            extras = [self.activation, self.transforms, self.alternatives, self.low_rank, self.rounding != "nearest"]
            if any(extra for extra in extras):
                raise RecipeError(
                    f'rule "{self.match}": it quantizes no weight; give one, or leave activation, transforms, rounding and '
                    "low_rank out."
                )
            return
        self._check_weight(self.weight)
        if self.activation is not None:
            self._check_activation(self.activation)
        for chain in (self.transforms, *self.alternatives):
            _check_order(chain)
        self._check_together(self.weight)

    @property
    def chains(self) -> tuple[tuple[TransformSpec, ...], ...]:
        """The chains of transforms to choose among, that of the recipe first."""
        return (self.transforms, *self.alternatives)

    @property
    def integer(self) -> bool:
        """Whether integer kernels multiply such layers: uniform grids, no scales per group but the two-level ones."""
        weight, activation = self.weight, self.activation
        if weight is None or activation is None:
            return False
        weight_fits = weight.grid == "uniform" and (weight.granularity != "group" or weight.two_level)
        return weight_fits and activation.grid == "uniform" and activation.granularity != "group"

    def _check_weight(self, weight: QuantSpec) -> None:
        where = f'rule "{self.match}"'
        if weight.dynamic or weight.granularity == "token" or weight.per_time_group:
            raise RecipeError(
                f"{where}: weights are fixed; their granularity is tensor, channel or group, never dynamic."
            )
        if weight.grid == "twin_region":
            raise RecipeError(f'{where}: grid "twin_region" is for activations; weights take uniform or twin_log.')
        if weight.range == "ema":
            raise RecipeError(
                f'{where}: range "ema" is for activations; weights take minmax, mse, percentile or output.'
            )

    def _check_together(self, weight: QuantSpec) -> None:
        """Range "output" fixes scales and codes in one search, which leaves nothing to a rounding or a branch."""
        searched = [
            label
            for label, spec in (("weight", weight), ("activation", self.activation))
            if spec is not None and spec.range == "output"
        ]
        if searched and (self.rounding != "nearest" or self.low_rank is not None):
            beside = f'rounding "{self.rounding}"' if self.rounding != "nearest" else "low_rank"
            raise RecipeError(
                f'rule "{self.match}": {searched[0]} range "output" searches the scales for rounding to nearest, got it with '
                f'{beside}; leave that out, or use range "mse".'
            )

    def _check_activation(self, activation: QuantSpec) -> None:
        where = f'rule "{self.match}"'
        if activation.bits not in ACTIVATION_BITS:
            allowed = ", ".join(map(str, ACTIVATION_BITS))
            raise RecipeError(f"{where}: activation bits: got {activation.bits}; allowed are {allowed}.")
        if activation.grid == "twin_log":
            raise RecipeError(f'{where}: grid "twin_log" is for weights; activations take uniform or twin_region.')
        if activation.granularity == "channel":
            raise RecipeError(
                f"{where}: activations are quantized per token, per group or per tensor, not per channel."
            )
        if (activation.granularity in ("token", "group")) != activation.dynamic:
            raise RecipeError(
                f"{where}: activations are dynamic per token or group, or static per tensor, "
                f"got {'dynamic' if activation.dynamic else 'static'} per {activation.granularity}."
            )
        if activation.dynamic and activation.range not in ("minmax", "mse"):
            raise RecipeError(
                f'{where}: dynamic activations take range "minmax" or "mse", which searches their clip factor, '
                f'got "{activation.range}".'
            )
        if activation.grid == "twin_region" and any(self.chains):
            raise RecipeError(
                f'{where}: grid "twin_region" needs the input as its activation function left it; leave the transforms out.'
            )


def _check_order(chain: tuple[TransformSpec, ...]) -> None:
    kinds = [transform.kind for transform in chain]
    if "adaptive_rotation" in kinds and set(kinds) - {"smooth", "adaptive_rotation"}:
        raise RecipeError(
            f"transforms: got {' > '.join(kinds)}; adaptive_rotation chooses the rotation itself, only smooth goes before it."
        )
    allowed = ("smooth", "adaptive_rotation", "greedy_rotation", "serpentine", "hadamard", "greedy_rotation")
    position = 0
    for kind in kinds:
        if kind not in allowed[position:]:
            raise RecipeError(
                f"transforms: got {' > '.join(kinds)}; the order is smooth > greedy_rotation > serpentine > "
                "hadamard > greedy_rotation, each left out at will, or smooth > adaptive_rotation."
            )
        position = allowed.index(kind, position) + 1
