"""The largest sharing whose pictures stay close to the unshared ones; and what a wish for a plan comes to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.gaps import Similarity
from trdq_core.metrics import likeness
from trdq_core.sampling import Conditioning, SampledModel, sample
from trdq_core.sharing import shared_copy
from trdq_core.sharing_plans import (
    blocks_of,
    plan_across,
    plan_sharing,
    plan_skipping,
    predict,
    saving_for_time,
    sharing_cells,
    within_store,
)
from trdq_core.specs import SharingSpec
from trdq_core.timegroups import TimeGroups

TARGET_DB = 35.0
MARGIN_DB = 1.0  # above the target, since prompts that were not tried may come out lower


class PictureJudge:
    """Samples prompts under a spec and compares with the unshared pictures, which are sampled once and kept."""

    def __init__(
        self,
        model: SampledModel,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int,
        on_event: OnEvent = ignore,
        cancelled: Callable[[], bool] | None = None,
        stage_units: int = 0,
    ) -> None:
        self.model, self.prompts = model, tuple(prompts)
        self._settings = {"steps": steps, "guidance": guidance}
        self._seed = seed
        self._progress = Progress("search", stage_units, on_event=on_event, cancelled=cancelled)
        self._conditionings: list[Conditioning] = model.encode(self.prompts)
        self._pictures: list[np.ndarray] = []
        self._seen: dict[tuple[SharingSpec, int], float] = {}

    def psnr(self, spec: SharingSpec, index: int) -> float:
        """PSNR in dB of one prompt's picture, or mean over the frames of its clip, under `spec` against the unshared one;
        infinite if they are equal."""
        while len(self._pictures) <= index:
            self._pictures.append(self._picture(None, len(self._pictures)))
        if (spec, index) not in self._seen:
            self._seen[spec, index] = likeness(self._picture(spec, index), self._pictures[index]).psnr
        return self._seen[spec, index]

    def lowest(self, spec: SharingSpec, *, at_least: float = -math.inf, count: int | None = None) -> float:
        """The lowest PSNR of the first `count` prompts (default all); stops at the first one below `at_least`."""
        lowest = math.inf
        for index in range(len(self.prompts) if count is None else count):
            lowest = min(lowest, self.psnr(spec, index))
            if lowest < at_least:
                break
        return lowest

    def _picture(self, spec: SharingSpec | None, index: int) -> np.ndarray:
        model = self.model
        denoiser = model.denoiser
        if spec is not None:
            denoiser, _, _ = shared_copy(denoiser, model.linears(), spec, argument=model.timestep_argument)
        with model.using(denoiser):
            run = sample(
                model, self._conditionings[index], self._seed + index, **self._settings,
                on_step=lambda step, timestep, latents: self._progress.check(),
            )  # fmt: skip
        self._progress.advance(self.prompts[index])
        return model.decode(run.latents[-1])


def auto_sharing(
    model: SampledModel,
    similarity: Similarity,
    groups: TimeGroups,
    *,
    target_db: float = TARGET_DB,
    prompts: Sequence[str],
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    margin_db: float = MARGIN_DB,
    store_bytes: int | None = None,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> SharingSpec:
    """The most sharing whose lowest PSNR of any prompt, against the unshared picture, stays at `target_db` or above.

    The blocks of each time group are put in order of their measured output error, and how many of them to share is found by
    bisection on the first half of `prompts`, each candidate judged by its lowest PSNR against target plus margin. PSNR
    need not fall with every further block, so what the bisection ends at is sampled on all prompts, and shortened block by
    block until it holds there too. Settings default to those of the measurement. The result holds the lowest PSNR and the
    number of prompts it was taken over (None if nothing differs, or nothing is shared). RecipeError without prompts.
    """
    spec = SharingSpec(edges=groups.edges, target_psnr_db=target_db, store_bytes=store_bytes)
    if not prompts:
        raise RecipeError("sharing PSNR: there are no prompts; give at least one to sample candidates on.")
    if margin_db < 0:
        raise RecipeError(f"sharing PSNR: got a margin of {margin_db:g} dB; give 0 or more.")
    about = similarity.about
    chosen = {"steps": steps, "guidance": guidance, "seed": seed}
    settings = {name: about[name] if value is None else value for name, value in chosen.items()}
    cells = within_store(sharing_cells(similarity, groups), similarity, store_bytes)
    if not cells:
        return predict(similarity, dataclasses.replace(spec, blocks=blocks_of((), groups)))
    half = -(-len(prompts) // 2)
    tries = math.ceil(math.log2(len(cells) + 1)) + 1
    judge = PictureJudge(
        model, prompts, **settings, on_event=on_event, cancelled=cancelled,
        stage_units=(tries + 1) * half + 2 * (len(prompts) - half),
    )  # fmt: skip

    def candidate(count: int) -> SharingSpec:
        return SharingSpec(blocks=blocks_of(cells[:count], groups), edges=groups.edges)

    least = target_db + margin_db
    found = bisect_largest(
        len(cells), lambda count: judge.lowest(candidate(count), at_least=least, count=half) >= least
    )
    while found and judge.lowest(candidate(found), at_least=least) < least:
        found -= 1
    lowest = judge.lowest(candidate(found)) if found else math.inf
    measured = {
        "measured_psnr_db": round(lowest, 3) if math.isfinite(lowest) else None,
        "measured_prompts": len(prompts) if found else None,
    }
    return predict(similarity, dataclasses.replace(spec, blocks=candidate(found).blocks, **measured))


def bisect_largest(count: int, passes: Callable[[int], bool]) -> int:
    """A number up to `count` that passes; the largest one if whatever is below a passing number passes too. 0 always does.

    The number returned has itself been tried, unless it is 0. `count` is tried first.
    """
    if count == 0 or passes(count):
        return count
    low, high = 0, count  # low passes, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def fulfil(
    model: SampledModel, similarity: Similarity, wish: SharingSpec, *, prompts: Sequence[str], **reports: Any
) -> SharingSpec:
    """The plan that `wish` asks for: blocks to share by a threshold, a saving or a PSNR, blocks to reuse across steps, and
    where to skip the unconditional branch. `prompts` are sampled where there is a PSNR to keep.

    A plan that reuses or skips beside a PSNR is measured as a whole, and refused if it falls below.
    """
    groups = TimeGroups(wish.edges)
    if wish.target_psnr_db is not None:
        plan = auto_sharing(
            model, similarity, groups, target_db=wish.target_psnr_db, prompts=prompts, store_bytes=wish.store_bytes,
            **reports,
        )  # fmt: skip
    elif wish.target_saving is not None or wish.target_step_share is not None:
        saving = wish.target_saving or saving_for_time(similarity, share=wish.target_step_share)
        plan = plan_sharing(similarity, groups, saving=saving, store_bytes=wish.store_bytes)
        plan = dataclasses.replace(plan, target_saving=wish.target_saving, target_step_share=wish.target_step_share)
    elif wish.measure is not None:
        plan = plan_sharing(
            similarity, groups, threshold=wish.threshold, measure=wish.measure, store_bytes=wish.store_bytes
        )
    else:
        plan = predict(similarity, SharingSpec(edges=groups.edges, store_bytes=wish.store_bytes))
    shared = plan
    if wish.across_threshold is not None:
        plan = plan_across(similarity, plan, wish.across_threshold)
    if wish.skip_threshold is not None or wish.skip_unconditional_below is not None:
        where = {"threshold": wish.skip_threshold} if wish.skip_threshold is not None else {
            "below": wish.skip_unconditional_below
        }  # fmt: skip
        plan = plan_skipping(similarity, plan, **where, guidance=wish.skipped_guidance)
    if wish.target_psnr_db is not None and plan is not shared and plan.active:
        plan = _measured(model, similarity, plan, wish.target_psnr_db, prompts, reports)
    return plan


def _measured(
    model: SampledModel,
    similarity: Similarity,
    plan: SharingSpec,
    target_db: float,
    prompts: Sequence[str],
    reports: Mapping[str, Any],
) -> SharingSpec:
    """`plan` with its lowest PSNR; CalibrationError if that is below the target."""
    settings = {name: similarity.about[name] for name in ("steps", "guidance", "seed")}
    judge = PictureJudge(model, prompts, **settings, **reports, stage_units=2 * len(prompts))
    lowest = judge.lowest(plan)
    if lowest < target_db:
        raise CalibrationError(
            f"sharing PSNR: with reuse across steps or skipping the lowest of {len(prompts)} prompts is {lowest:.1f} dB, "
            f"asked were {target_db:g}; lower their thresholds."
        )
    psnr_db = round(lowest, 3) if math.isfinite(lowest) else None
    return dataclasses.replace(plan, measured_psnr_db=psnr_db, measured_prompts=len(prompts))
