"""The flags of the attention command that say what to plan, and the wish they end in. No torch."""

from __future__ import annotations

import argparse
from typing import Any

from trdq_core.errors import RecipeError
from trdq_core.specs import SHARING_MEASURES, SKIPPED_GUIDANCE, SharingSpec

Given = dict[str, Any]  # the flags that were typed, nothing else


def add_sharing_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what to plan by."""
    add = parser.add_argument
    add(
        "--threshold",
        type=float,
        metavar="X",
        help="write a plan.json with the blocks whose measure stays within X at every step",
    )
    add(
        "--measure",
        choices=SHARING_MEASURES,
        help="output_error (default): at most X; map_cosine: at least X",
    )
    add("--edges", metavar="T,T", help="timesteps between 0 and 1000 at which the plan may change")
    add(
        "--saving",
        type=float,
        metavar="S",
        help="share the blocks of least error until this share of attention FLOPs is saved",
    )
    add("--step-share", type=float, metavar="S", help="the same until a step has this share of its operations less")
    add("--save-ms", type=float, metavar="MS", help="the same in milliseconds of a step that takes --step-ms")
    add("--step-ms", type=float, metavar="MS", help="measured time of a step, as compare and profile report it")
    add(
        "--psnr",
        type=float,
        metavar="DB",
        help="share the most blocks whose pictures all stay above this PSNR, such as 35",
    )
    add("--store-bytes", type=int, metavar="N", help="keep at most N bytes between calls, for one prompt")
    add("--across", type=float, metavar="X", help="reuse, every second step, outputs that move by at most X in a step")
    skip = parser.add_mutually_exclusive_group()
    skip.add_argument("--skip-below", type=float, metavar="T", help="skip the unconditional branch below timestep T")
    skip.add_argument(
        "--skip",
        type=float,
        metavar="X",
        help="skip it from where on the guidance moves by at most X of the prediction in a step",
    )
    add(
        "--skipped-guidance",
        choices=SKIPPED_GUIDANCE,
        help="held (default): the last guidance difference goes on; off: the conditional prediction alone",
    )


def sharing_wish(given: Given, from_file: bool) -> dict[str, Any]:
    """What the attention command is to plan; nothing without something to plan by."""
    given = given | _step_share(given)
    plan_by = ("threshold", "saving", "step_share", "psnr", "across", "skip", "skip_below")
    planned = [name for name in plan_by if name in given]
    if not planned:
        asked = [name for name in ("measure", "edges", "store_bytes", "skipped_guidance") if name in given]
        if asked:
            raise RecipeError(
                f"--threshold: it is missing; a plan takes --threshold, --saving, --psnr, --across or --skip beside "
                f"--{asked[0].replace('_', '-')}."
            )
        return {} if from_file else {"sharing": None}
    if "measure" in given and "threshold" not in given:
        raise RecipeError("--measure: it says what --threshold is a limit of; give --threshold too, or leave it out.")
    if "skipped_guidance" in given and not {"skip", "skip_below"} & set(given):
        raise RecipeError("--skipped-guidance: nothing is skipped; give --skip or --skip-below too, or leave it out.")
    edges = parse_edges(given["edges"]) if "edges" in given else ()
    wish = SharingSpec(
        edges=edges,
        measure=given.get("measure", "output_error") if "threshold" in given else None,
        threshold=given.get("threshold"),
        target_saving=given.get("saving"),
        target_step_share=given.get("step_share"),
        target_psnr_db=given.get("psnr"),
        store_bytes=given.get("store_bytes"),
        across_threshold=given.get("across"),
        skip_threshold=given.get("skip"),
        skip_unconditional_below=given.get("skip_below"),
        skipped_guidance=given.get("skipped_guidance", "held"),
    )
    return {"sharing": wish.to_dict()}


def _step_share(given: Given) -> Given:
    """Milliseconds of a step as a share of it."""
    if ("save_ms" in given) != ("step_ms" in given):
        raise RecipeError("--save-ms: it goes with --step-ms, the measured time of a step; give both or neither.")
    if "save_ms" not in given:
        return {}
    if "step_share" in given:
        raise RecipeError("--save-ms: --step-share says the same; give one of the two.")
    if given["step_ms"] <= 0:
        raise RecipeError(f"--step-ms: got {given['step_ms']:g}; give the time of a step in milliseconds, above 0.")
    return {"step_share": given["save_ms"] / given["step_ms"]}


def parse_edges(text: str) -> tuple[float, ...]:
    """Timesteps with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"--edges: got {text!r}; give numbers with commas between them, such as 250,500,750."
        ) from None
