"""Plans made from the measured gaps: which blocks share, which outputs are reused, from where on a branch is skipped, and
what that saves and costs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.gaps import Similarity
from trdq_core.sharing import attention_flops
from trdq_core.specs import SharingMeasure, SharingSpec, SkippedGuidance
from trdq_core.timegroups import TimeGroups


class Cell(NamedTuple):
    """One block in one time group, and its worst score over the steps of the group (0: nothing is lost)."""

    worst: float
    group: int
    block: int


class StepWork(NamedTuple):
    """What a step of the measured run would do under a spec."""

    index: int
    group: int
    skipped: bool  # the unconditional branch is not computed
    shared: tuple[int, ...]  # blocks that share one map between the branches
    reused: tuple[int, ...]  # blocks whose output is that of the step before


def sharing_cells(similarity: Similarity, groups: TimeGroups, measure: SharingMeasure = "output_error") -> list[Cell]:
    """Every block in every group that has steps, the least harm first."""
    score = similarity.block_error if measure == "output_error" else 1 - similarity.map_cosine.mean(-1)
    return _cells(similarity, groups, score)


def _cells(similarity: Similarity, groups: TimeGroups, score: Tensor) -> list[Cell]:
    """The worst of `score` (timesteps, blocks) in each group; steps with NaN, the first of a run, have no say."""
    found = []
    for group in range(groups.count):
        steps = [i for i, t in enumerate(similarity.timesteps) if groups.group_of(t) == group]
        for block in range(score.shape[1]):
            values = [v for i in steps if not math.isnan(v := float(score[i, block]))]
            if values:
                found.append(Cell(max(values), group, block))
    return sorted(found)


def blocks_of(cells: Sequence[Cell], groups: TimeGroups) -> tuple[tuple[int, ...], ...]:
    """The cells as lists of blocks, one a group."""
    return tuple(tuple(sorted(c.block for c in cells if c.group == group)) for group in range(groups.count))


def store_bytes_of_block(similarity: Similarity) -> int:
    """Bytes that one block keeps for one prompt: with two calls its queries and keys, across steps both its outputs.

    Both are two tensors (tokens, channels). With both branches in one batch, sharing keeps nothing.
    """
    about = similarity.about
    return 2 * _parts(similarity) * about["tokens"] * about["channels"] * about.get("dtype_bytes", 4)


def within_store(cells: Sequence[Cell], similarity: Similarity, store_bytes: int | None) -> list[Cell]:
    """The first cells, by their order, of which no group keeps more than `store_bytes`."""
    if store_bytes is None:
        return list(cells)
    room = store_bytes // store_bytes_of_block(similarity)
    taken: dict[int, int] = {}
    kept = []
    for cell in cells:
        if taken.get(cell.group, 0) < room:
            taken[cell.group] = taken.get(cell.group, 0) + 1
            kept.append(cell)
    return kept


def plan_sharing(
    similarity: Similarity,
    groups: TimeGroups,
    *,
    threshold: float | None = None,
    measure: SharingMeasure = "output_error",
    saving: float | None = None,
    store_bytes: int | None = None,
) -> SharingSpec:
    """The blocks to share in each time group: those within `threshold` at every step of the group, or, with a budget
    `saving` (share of the attention FLOPs), those of least error until it is reached.

    The threshold is a greatest output error, or a least mean cosine of the maps. `store_bytes` is the most that the blocks
    of a group may keep between two calls, for one prompt. The plan says what it saves and costs.
    """
    if (threshold is None) == (saving is None):
        raise RecipeError("sharing plan: give a threshold or a saving to reach, one of the two.")
    cells = within_store(sharing_cells(similarity, groups, measure), similarity, store_bytes)
    if threshold is not None:
        limit = threshold if measure == "output_error" else 1 - threshold
        chosen = [cell for cell in cells if cell.worst <= limit]
    else:
        chosen, reached = [], 0.0
        whole, saved = _flops(similarity)
        steps_of = [sum(groups.group_of(t) == g for t in similarity.timesteps) for g in range(groups.count)]
        for cell in cells:
            if reached >= saving - 1e-9:
                break
            chosen.append(cell)
            reached += steps_of[cell.group] * saved / (whole * similarity.block_error.numel())
    spec = SharingSpec(
        blocks=blocks_of(chosen, groups), edges=groups.edges, measure=measure if threshold is not None else None,
        threshold=threshold, target_saving=saving, store_bytes=store_bytes,
    )  # fmt: skip
    return predict(similarity, spec)


def plan_across(similarity: Similarity, spec: SharingSpec, threshold: float) -> SharingSpec:
    """`spec` with the blocks whose self-attention output moves by at most `threshold` from step to step, in each of its
    groups; they take it from the step before at every second step. CalibrationError if that was not measured."""
    score = _measured(similarity, similarity.step_error, "differences between neighbouring steps")
    groups = TimeGroups(spec.edges)
    cells = [cell for cell in _cells(similarity, groups, score) if cell.worst <= threshold]
    if spec.store_bytes is not None:
        room = spec.store_bytes - max((len(b) for b in spec.blocks), default=0) * store_bytes_of_block(similarity)
        cells = within_store(cells, similarity, max(room, 0))
    return predict(
        similarity, dataclasses.replace(spec, across_steps=blocks_of(cells, groups), across_threshold=threshold)
    )


def plan_skipping(
    similarity: Similarity,
    spec: SharingSpec,
    *,
    threshold: float | None = None,
    below: float | None = None,
    guidance: SkippedGuidance = "held",
) -> SharingSpec:
    """`spec` with the unconditional branch skipped below the timestep `below`, or below the first step from which on the
    guidance difference changes by at most `threshold` a step, see `guidance_error`. CalibrationError if that was not
    measured. What is held for several steps may be off by the sum of their changes."""
    if (threshold is None) == (below is None):
        raise RecipeError("sharing skip: give a timestep or a threshold to find it by, one of the two.")
    if threshold is not None:
        change = guidance_error(similarity)
        first = len(similarity.timesteps)
        while first > 1 and float(change[first - 1]) <= threshold:
            first -= 1
        if first < len(similarity.timesteps):
            below = (similarity.timesteps[first - 1] + similarity.timesteps[first]) / 2
    return predict(
        similarity,
        dataclasses.replace(spec, skip_unconditional_below=below, skipped_guidance=guidance, skip_threshold=threshold),
    )


def guidance_error(similarity: Similarity) -> Tensor:
    """How far the guidance difference d moves in a step, against the prediction: ||d_t - d_before|| / ||conditional_t||.

    (timesteps,), NaN in the first. It is the change of direction times the size of d: late in sampling d turns quickly, but
    is small. Guidance w multiplies it by w - 1.
    """
    change = _measured(similarity, similarity.guidance_change, "changes of the guidance direction")
    return change * _measured(similarity, similarity.guidance_share, "the size of the guidance")


def simulate(similarity: Similarity, spec: SharingSpec) -> Iterator[StepWork]:
    """What each step of a run like the measured one would leave out, by the rules that the denoiser itself follows."""
    groups, below = TimeGroups(spec.edges), spec.skip_unconditional_below
    kept: set[int] = set()
    for index, timestep in enumerate(similarity.timesteps):
        group = groups.group_of(timestep)
        skipped = below is not None and timestep < below and (spec.skipped_guidance == "off" or index > 0)
        across = spec.across_steps[group] if spec.across_steps else ()
        reused = tuple(block for block in across if block in kept)
        shared = spec.blocks[group] if spec.blocks and not skipped else ()
        yield StepWork(index, group, skipped, tuple(b for b in shared if b not in reused), reused)
        kept = set(across) - set(reused)


def predict(similarity: Similarity, spec: SharingSpec) -> SharingSpec:
    """`spec` with the errors and the savings that the measures foretell for it."""
    steps = list(simulate(similarity, spec))
    errors = [float(similarity.block_error[step.index, block]) for step in steps for block in step.shared]
    whole, saved = _flops(similarity)
    everything = whole * similarity.block_error.numel()
    found: dict[str, float | int | None] = {
        "predicted_error": sum(errors) / len(errors) if errors else 0.0,
        "worst_error": max(errors, default=0.0),
        "predicted_saving": len(errors) * saved / everything,
        "kept_bytes": _kept_bytes(similarity, spec),
    }
    if spec.across_steps:
        moved = _measured(similarity, similarity.step_error, "differences between neighbouring steps")
        errors = [float(moved[step.index, block]) for step in steps for block in step.reused]
        gone = sum((whole // 2 if step.skipped else whole) * len(step.reused) for step in steps)
        found |= {
            "across_error": sum(errors) / len(errors) if errors else 0.0,
            "across_saving": gone / everything,
        }
    if spec.skip_unconditional_below is not None:
        skipped = [step.index for step in steps if step.skipped]
        known = similarity.guidance_change is not None
        worst = [float(guidance_error(similarity)[i]) for i in skipped if i] if known else []
        found |= {
            "skipped_change": max(worst, default=0.0) if known else None,
            "skipped_saving": len(skipped) / (2 * len(steps)),
        }
    return dataclasses.replace(spec, **found)


def attention_share(similarity: Similarity) -> float:
    """The self-attentions' share of the FLOPs of one call of the denoiser."""
    flops = similarity.about.get("denoiser_flops")
    if not flops:
        raise CalibrationError(
            "similarity: it is of an older format without the operations of the denoiser; measure it again."
        )
    return _parts(similarity) * _flops(similarity)[0] * similarity.block_error.shape[1] / flops


def work_saving(similarity: Similarity, spec: SharingSpec) -> float:
    """Share of all FLOPs of the denoiser over a run that `spec` leaves out."""
    spec = predict(similarity, spec)
    of_attention = (spec.predicted_saving or 0.0) + (spec.across_saving or 0.0)
    return of_attention * attention_share(similarity) + (spec.skipped_saving or 0.0)


def saving_for_time(
    similarity: Similarity,
    *,
    milliseconds: float | None = None,
    share: float | None = None,
    step_ms: float | None = None,
) -> float:
    """The saving to ask `plan_sharing` for, as a share of the attention FLOPs, so that a step gets shorter by `milliseconds`
    of its measured `step_ms`, or by `share` of it.

    Time is taken to go with operations. RecipeError if sharing every block saves less than what is asked.
    """
    if (milliseconds is None) == (share is None):
        raise RecipeError("time budget: give milliseconds or a share of the step, one of the two.")
    if milliseconds is not None:
        if step_ms is None or step_ms <= 0:
            raise RecipeError("time budget: milliseconds need the measured time of a step beside them; give step_ms.")
        share = milliseconds / step_ms
    assert share is not None
    if share <= 0:
        raise RecipeError(f"time budget: got {share:g} of a step; give more than 0.")
    whole, saved = _flops(similarity)
    of_attention, most = share / attention_share(similarity), saved / whole
    if of_attention > most + 1e-9:
        limit = most * attention_share(similarity)
        asked = f"{milliseconds:g} of {step_ms:g} ms" if milliseconds is not None else f"{share:g} of a step"
        raise RecipeError(
            f"time budget: got {asked}; sharing in every block saves {limit:.3f} of a step by its operations, "
            "ask for at most that."
        )
    return of_attention


def _kept_bytes(similarity: Similarity, spec: SharingSpec) -> int:
    """Most that is kept at any time for one prompt, with two calls."""
    counts = [
        len(shared) + len(across)
        for shared, across in itertools.zip_longest(spec.blocks, spec.across_steps, fillvalue=())
    ]
    return max(counts, default=0) * store_bytes_of_block(similarity)


def _parts(similarity: Similarity) -> int:
    """How many frames of a clip, or patches over time, each block looks at one by one; 1 for pictures."""
    return similarity.about.get("patches", similarity.about.get("frames", 1))


def _flops(similarity: Similarity) -> tuple[int, int]:
    """Of one part, see `attention_flops`."""
    return attention_flops(similarity.about["tokens"], similarity.about["channels"])


def _measured(similarity: Similarity, tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise CalibrationError(f"similarity: it is of an older format without {what}; measure it again.")
    return tensor
