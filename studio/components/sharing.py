"""A sharing plan in numbers and words, and its measures as tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

import numpy as np

from studio.components import words
from studio.services.parts import TEMPORAL
from studio.services.similarity import MEASURE_WORDS, PlanView, SharingMeasure, SimilarityView

NOTHING = "No block is shared."


def plan_summary(view: SimilarityView, plan: PlanView) -> str:
    """What the plan saves and costs, and which blocks it shares when; read out when it changes."""
    spec, cells = plan.spec, plan.shared
    error, worst = spec.predicted_error or 0.0, spec.worst_error or 0.0
    shared, most = int(cells.sum()), f"{view.largest_saving:.1%}"
    cards = (
        ("Predicted saving", f"{spec.predicted_saving or 0.0:.1%}", f"of attention FLOPs; {most} if all share"),
        ("Predicted error", f"{error:.3f}" if shared else "none", "mean over what is shared"),
        ("Worst error", f"{worst:.3f}" if shared else "none", "of one block at one step"),
        ("Shared", f"{shared} of {cells.size}", "block and step pairs"),
    )  # fmt: skip
    body = "".join(
        f'<div class="tr-card"><dt>{name}</dt><dd>{value}</dd><small>{escape(tail)}</small></div>'
        for name, value, tail in cards
    )
    return (
        f'<div role="status" aria-live="polite"><p class="tr-plan-said"><b>Plan:</b> {escape(plan.said)}.</p>'
        f'<div class="tr-cards">{body}</div>{_groups(plan)}</div>'
    )


def _groups(plan: PlanView) -> str:
    if not plan.spec.active:
        return f'<p class="tr-small tr-note">{NOTHING}</p>'
    lines = "".join(
        f"<li>timesteps {escape(label)}: {block_ranges(blocks)}</li>"
        for label, blocks in reversed(list(zip(plan.labels, plan.spec.blocks, strict=True)))
    )
    return f'<ul class="tr-small tr-groups">{lines}</ul>'


def block_ranges(blocks: Sequence[int]) -> str:
    """ "blocks 0 to 3, 7" for (0, 1, 2, 3, 7)."""
    if not blocks:
        return "none"
    runs = [
        [block for _, block in run] for _, run in itertools.groupby(enumerate(sorted(blocks)), lambda p: p[1] - p[0])
    ]
    parts = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"{'block' if len(blocks) == 1 else 'blocks'} {', '.join(parts)}"


def group_table(view: SimilarityView, plan: PlanView, measure: SharingMeasure) -> str:
    """The measure of each block at its worst step of each time group, shared ones marked."""
    order = list(reversed(range(len(plan.labels))))
    head = "".join(f"<th>{escape(plan.labels[group])}</th>" for group in order)
    body = "".join(
        f"<tr><th>{block}</th>{''.join(_worst(view, plan, measure, block, group) for group in order)}</tr>"
        for block in range(view.count)
    )
    said = f"Each block at its worst step of each time group ({MEASURE_WORDS[measure]}); ● is shared by the plan."
    return (
        f'<p class="tr-small">{said}</p><div class="tr-table" tabindex="0"><table><thead><tr><th>block</th>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _worst(view: SimilarityView, plan: PlanView, measure: SharingMeasure, block: int, group: int) -> str:
    values = view.blocks[measure][plan.groups == group, block]
    if not len(values):
        return '<td class="num">–</td>'
    worst = float(values.max() if measure == "output_error" else values.min())
    mark = "● " if block in plan.spec.blocks[group] else ""
    return f'<td class="num">{mark}{worst:.3f}</td>'


def step_table(view: SimilarityView, measure: SharingMeasure) -> str:
    """The measure of each block at each timestep."""
    steps = list(reversed(range(len(view.timesteps))))
    head = "".join(f"<th>{view.timesteps[step]:.0f}</th>" for step in steps)
    values = view.blocks[measure]
    lines = [[*values[steps, block], np.mean(values[:, block])] for block in range(view.count)]
    body = "".join(
        f"<tr><th>{block}</th>" + "".join(f'<td class="num">{value:.3f}</td>' for value in line) + "</tr>"
        for block, line in enumerate(lines)
    )
    said = f"Each block ({MEASURE_WORDS[measure]}) at each timestep, in the order of sampling, and its mean."
    return (
        f'<p class="tr-small tr-note">{said}</p><div class="tr-table" tabindex="0"><table><thead><tr><th>block</th>{head}'
        f"<th>mean</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def about_line(view: SimilarityView) -> str:
    """What was measured on, in one line."""
    about = view.about
    prompts = words.plural(len(about.get("prompts") or ()), "prompt")
    heads = view.heads["output_error"].shape[2]
    said = (
        f"Means over {prompts}: {words.plural(view.count, 'block')} of {words.plural(heads, 'head')}, "
        f"{words.plural(len(view.timesteps), 'step')}, {_tokens(view)}; "
        f"measured in {words.duration(about.get('seconds'))}."
    )
    return f'<p class="tr-small">{escape(said)}</p>'


def _tokens(view: SimilarityView) -> str:
    """What one attention looks at: the tokens of a picture or of a frame, or one patch in all frames."""
    count, frames, patches = (view.about.get(name) for name in ("tokens", "frames", "patches"))
    if view.part == TEMPORAL:
        return f"{count} frames at each of {patches} patches"
    return f"{count} tokens in each of {frames} frames" if view.frame_by_frame else f"{count or '?'} tokens"
