"""Recipes: rules for layers, time groups, storage, sharing, attention products, reconstruction."""

from __future__ import annotations

import itertools
import re
import typing
from dataclasses import dataclass, field
from typing import Literal

from trdq_core.errors import RecipeError
from trdq_core.specs.base import FORMAT_VERSION, TIME_SPAN, Spec
from trdq_core.specs.layers import ACTIVATION_BITS, LayerRule

TimeGroupKind = Literal["uniform", "edges", "per_step", "dp"]
Storage = Literal["shared", "resident", "switched"]
SharingMeasure = Literal["map_cosine", "output_error"]
SkippedGuidance = Literal["held", "off"]

STORAGE_MODES: tuple[Storage, ...] = typing.get_args(Storage)
SHARING_MEASURES: tuple[SharingMeasure, ...] = typing.get_args(SharingMeasure)
SKIPPED_GUIDANCE: tuple[SkippedGuidance, ...] = typing.get_args(SkippedGuidance)
REFERENCE_NAMES = ("fp", "fp-again")  # rows of the reference and of the reference again; no other recipe is called so
LONGEST_NAME = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*", re.ASCII)
TIME_GROUP_KINDS: tuple[TimeGroupKind, ...] = typing.get_args(TimeGroupKind)


@dataclass(frozen=True, kw_only=True)
class TimeGroupSpec(Spec):
    """How the time axis [0, 1000] is cut.

    "uniform" into `count` equal parts; "edges" at given timesteps; "per_step" puts one group around each calibrated
    timestep; "dp" into `count` parts within which the channel ranges change least, by dynamic programming.
    """

    kind: TimeGroupKind = "uniform"
    count: int = 1
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 1000:
            raise RecipeError(f"groups: got {self.count}; allowed is 1 to 1000.")
        if self.kind == "edges":
            ordered = all(a < b for a, b in itertools.pairwise(self.edges))
            if not self.edges or not ordered or not all(0 < edge < TIME_SPAN for edge in self.edges):
                raise RecipeError(
                    f"edges: got {list(self.edges)}; give rising timesteps between 0 and 1000, both ends left out."
                )

    def groups_in(self, steps: int) -> int:
        """How many groups a calibration of `steps` timesteps is cut into; `count` speaks for kinds "uniform" and "dp"."""
        if self.kind == "per_step":
            return steps
        return (
            len(self.edges) + 1 if self.kind == "edges" else min(self.count, steps) if self.kind == "dp" else self.count
        )


@dataclass(frozen=True, kw_only=True)
class SharingSpec(Spec):
    """What guidance computes less of, for each group of timesteps; group 0 holds the smallest timesteps.

    `blocks[g]`: blocks whose unconditional branch takes the self-attention map of the conditional one. `across_steps[g]`:
    blocks whose self-attention output is that of the previous step, at every second step. Below the timestep
    `skip_unconditional_below` only the conditional branch is computed. `edges` are the rising borders between the groups.

    With a wish (threshold, saving, PSNR) and no block it is what `auto_sharing.fulfil` makes a plan of. Errors are
    relative output errors; savings of attention are shares of the attention FLOPs of a whole run, `skipped_saving` is a
    share of all work of the denoiser; all measured before. None of them count one operation twice.
    """

    blocks: tuple[tuple[int, ...], ...] = ()
    edges: tuple[float, ...] = ()
    measure: SharingMeasure | None = None
    threshold: float | None = None
    predicted_error: float | None = None  # mean over the shared blocks and steps
    worst_error: float | None = None
    predicted_saving: float | None = None
    description: str = ""
    across_steps: tuple[tuple[int, ...], ...] = ()
    skip_unconditional_below: float | None = None
    skipped_guidance: SkippedGuidance = (
        "held"  # "held": the last guidance difference again; "off": the conditional alone
    )
    target_saving: float | None = None  # share of the attention FLOPs that was asked for
    target_step_share: float | None = None  # share of a step's time that was asked for, by operations
    target_psnr_db: float | None = None  # least PSNR of any prompt that was asked for
    store_bytes: int | None = None  # most that may be kept between calls
    across_threshold: float | None = None  # greatest error of an output taken from the previous step
    skip_threshold: float | None = None  # greatest change of the guidance difference in a step, against the prediction
    measured_psnr_db: float | None = None  # lowest PSNR of a prompt against the unshared picture
    measured_prompts: int | None = None
    across_error: float | None = None
    across_saving: float | None = None
    skipped_change: float | None = None
    skipped_saving: float | None = None
    kept_bytes: int | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if not rising or any(not 0 < edge < TIME_SPAN for edge in self.edges):
            raise RecipeError(
                f"sharing edges: got {list(self.edges)}; give rising timesteps between 0 and 1000, both ends left out."
            )
        for field_name, lists in (("blocks", self.blocks), ("across_steps", self.across_steps)):
            if lists and len(lists) != len(self.edges) + 1:
                raise RecipeError(
                    f"sharing {field_name}: got {len(lists)} lists for {len(self.edges) + 1} time groups; "
                    "give one list a group."
                )
            if any(block < 0 for group in lists for block in group):
                raise RecipeError(f"sharing {field_name}: got a negative block number; blocks count from 0.")
        if (self.measure is None) != (self.threshold is None):
            raise RecipeError("sharing threshold: a measure and its threshold are given together, or neither is.")
        self._check_wishes()

    def _check_wishes(self) -> None:
        below = self.skip_unconditional_below
        if below is not None and not 0 < below <= TIME_SPAN:
            raise RecipeError(
                f"sharing skip_unconditional_below: got {below:g}; allowed is a timestep above 0, up to 1000."
            )
        for label, share in (("saving", self.target_saving), ("step share", self.target_step_share)):
            if share is not None and not 0 < share <= 1:
                raise RecipeError(f"sharing {label}: got {share:g}; give a share above 0, up to 1, such as 0.1.")
        if self.target_psnr_db is not None and not 10 <= self.target_psnr_db <= 100:
            raise RecipeError(f"sharing PSNR: got {self.target_psnr_db:g} dB; allowed is 10 to 100.")
        for label, number in (
            ("store_bytes", self.store_bytes),
            ("across_threshold", self.across_threshold),
            ("skip_threshold", self.skip_threshold),
        ):
            if number is not None and number < 0:
                raise RecipeError(f"sharing {label}: got {number:g}; give 0 or more.")
        if sum(wish is not None for wish in self._wishes()) > 1:
            raise RecipeError(
                "sharing: give a threshold, a saving, a step share or a PSNR to plan by, one of the four."
            )

    def _wishes(self) -> tuple[float | None, ...]:
        return (self.threshold, self.target_saving, self.target_step_share, self.target_psnr_db)

    @property
    def active(self) -> bool:
        """Whether anything is computed less at any time."""
        return any(self.blocks) or any(self.across_steps) or self.skip_unconditional_below is not None

    @property
    def wished(self) -> bool:
        """Whether there is anything to plan by."""
        further = (self.across_threshold, self.skip_threshold, self.skip_unconditional_below)
        return any(wish is not None for wish in (*self._wishes(), *further))


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(Spec):
    """Quantized products of attention, queries with keys and softmax with values: static grids, one for each head.

    "twin_region" gives the softmax two steps, fine below a threshold and coarse above (TQ-DiT, after PTQ4ViT). `live` takes
    scales of the live operands instead, a token or channel each (SageAttention, arXiv 2410.02367): the int8 kernel of the
    CPU's fused attention multiplies them; attention that is not fused stays exact.
    """

    bits: int = 8  # of queries, keys and values
    softmax_bits: int = 8
    softmax_grid: Literal["uniform", "twin_region"] = "uniform"
    per_time_group: bool = False  # thresholds of the softmax grid for each time group (TQ-DiT)
    cross: bool = True  # cross-attention too
    live: bool = False  # real int8 products where the attention is fused; nothing is calibrated or simulated

    def __post_init__(self) -> None:
        for label, bits in (("bits", self.bits), ("softmax_bits", self.softmax_bits)):
            if bits not in ACTIVATION_BITS:
                allowed = ", ".join(map(str, ACTIVATION_BITS))
                raise RecipeError(f"attention {label}: got {bits}; allowed are {allowed}.")
        if self.per_time_group and self.softmax_grid != "twin_region":
            raise RecipeError(
                'attention per_time_group: it is for softmax_grid "twin_region", whose threshold then moves.'
            )
        if self.live and (self.bits, self.softmax_bits, self.softmax_grid) != (8, 8, "uniform"):
            raise RecipeError(
                f"attention live: got {self.bits} bits and {self.softmax_bits}-bit {self.softmax_grid} softmax; the kernel "
                "takes bits 8, softmax_bits 8 and softmax_grid uniform."
            )


@dataclass(frozen=True, kw_only=True)
class ReconstructionSpec(Spec):
    """Learning the rounding on the outputs of a unit, with AdaRound's relaxation (BRECQ, Q-Diffusion, TFMQ-DM).

    `temporal_block` learns the layers that read only the timestep first and on their own (TFMQ-DM). The loss is the output
    error over that of rounding to nearest, plus `round_weight` times the sum of 1 - |2h - 1|^beta. The published 20,000
    iterations of rate 4e-4 move h as far as 500 of rate 0.03 do.
    """

    unit: Literal["layer", "block"] = "block"
    temporal_block: bool = False
    iterations: int = 200
    batch: int = 16
    learning_rate: float = 0.03
    round_weight: float = 1e-3
    warm_up: float = 0.2  # share of the iterations without the rounding penalty
    beta: tuple[float, ...] = (20.0, 2.0)

    def __post_init__(self) -> None:
        if not 1 <= self.iterations <= 100_000:
            raise RecipeError(f"iterations: got {self.iterations}; allowed is 1 to 100,000.")
        if not 1 <= self.batch <= 1024:
            raise RecipeError(f"batch: got {self.batch}; allowed is 1 to 1024.")
        if not 0 < self.learning_rate <= 1:
            raise RecipeError(f"learning_rate: got {self.learning_rate}; allowed is above 0 to 1.")
        if not 0 <= self.round_weight <= 1e6:
            raise RecipeError(f"round_weight: got {self.round_weight}; allowed is 0 to 1,000,000.")
        if not 0 <= self.warm_up < 1:
            raise RecipeError(f"warm_up: got {self.warm_up}; allowed is 0 up to, not including, 1.")
        if len(self.beta) != 2 or self.beta[0] < self.beta[1] or self.beta[1] <= 0:
            raise RecipeError(f"beta: got {list(self.beta)}; give two numbers, the first larger, both above 0.")


@dataclass(frozen=True, kw_only=True)
class Recipe(Spec):
    """A quantization method with its numbers. A method is data: adding one needs no class."""

    name: str
    rules: tuple[LayerRule, ...] = ()
    time: TimeGroupSpec = field(default_factory=TimeGroupSpec)
    storage: Storage = "shared"
    do_no_harm: bool = True
    sharing: SharingSpec | None = None
    attention: AttentionSpec | None = None
    reconstruction: ReconstructionSpec | None = None
    description: str = ""
    source: str = ""
    format_version: int = FORMAT_VERSION
    peer: str | None = None  # another tool does the work, `presets.PEERS` names them; the rules say on which layers

    def __post_init__(self) -> None:
        self._check_name()
        if self.peer is not None:
            self._check_peer()
        if self.format_version > FORMAT_VERSION:
            raise RecipeError(
                f"format_version: got {self.format_version}; this version reads up to {FORMAT_VERSION}, update TR-DQ Studio."
            )
        rounded = any(rule.rounding == "adaround" for rule in self.rules)
        if self.reconstruction is not None and not rounded:
            raise RecipeError(
                f'{self.name}: reconstruction learns the rounding; set rounding "adaround" in a rule or leave it out.'
            )
        if rounded and self.storage != "shared":
            raise RecipeError(
                f'{self.name}: rounding "adaround" learns one weight for all timesteps; use storage "shared".'
            )
        if rounded and self.reconstruction is None:
            raise RecipeError(
                f'{self.name}: rounding "adaround" is learnt by a reconstruction, and there is none; give one, or use '
                'rounding "nearest" or "gptq".'
            )
        if self.attention is not None and self.sharing is not None:
            raise RecipeError(
                f"{self.name}: attention products are either quantized or shared between the branches; leave one out."
            )
        if self.attention is not None and not self.quantized:
            raise RecipeError(
                f"{self.name}: attention products are quantized beside linears, and no rule quantizes any; give a rule with a "
                "weight, or leave attention out."
            )

    def _check_name(self) -> None:
        """Files are called by it (pictures, tables of samples, switched sets), and rows of reports."""
        if len(self.name) > LONGEST_NAME:
            raise RecipeError(
                f"recipe name: got {len(self.name)} characters; allowed are at most {LONGEST_NAME}, shorten it."
            )
        if not _NAME.fullmatch(self.name):
            raise RecipeError(
                f"recipe name: got {self.name!r}; use letters, digits, dashes, dots and plus signs, beginning with a letter or "
                "digit, such as my-plan."
            )
        taken = REFERENCE_NAMES if self.changes else REFERENCE_NAMES[1:]
        if self.name.lower() in taken:
            raise RecipeError(
                f"recipe name: {self.name} is the name of the full-precision reference's own rows; choose another."
            )

    def _check_peer(self) -> None:
        ours = (self.sharing, self.attention, self.reconstruction)
        if any(part is not None for part in ours) or any(any(rule.chains) for rule in self.rules):
            raise RecipeError(
                f"{self.name}: the tool {self.peer} decides how it quantizes; leave sharing, attention, reconstruction and "
                "transforms out, its rules only say which layers."
            )

    @property
    def quantized(self) -> bool:
        """Whether any rule quantizes anything."""
        return any(rule.weight is not None for rule in self.rules)

    @property
    def simulated_attention(self) -> bool:
        """Whether attention products are computed in floating point on static grids, which are calibrated."""
        return self.attention is not None and not self.attention.live

    @property
    def changes(self) -> bool:
        """Whether anything of the denoiser becomes another; the full-precision reference is the recipe that changes nothing."""
        return self.quantized or self.sharing is not None or self.peer is not None

    @property
    def fitted(self) -> bool:
        """Whether this project quantizes by it, and so needs the statistics of a calibration; another tool brings its own."""
        return self.quantized and self.peer is None
