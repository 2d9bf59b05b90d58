"""What the command line shows: a progress bar fed by events, and tables of plans and reports. Text in, text out; no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from trdq_core import profile_text
from trdq_core.evaluation import tables
from trdq_core.events import Event

NONE = "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Rows under a header in aligned columns; the first `left` columns are set left, the others right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def size(count: float | None) -> str:
    """Bytes as people read them: 512 B, 12.3 KiB, 4.00 MiB."""
    if count is None:
        return NONE
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024 or unit == "GiB":
            break
    return f"{count:.2f} {unit}" if count < 10 else f"{count:.1f} {unit}"


def number(value: float | None, digits: int = 1) -> str:
    """A number with fixed decimals, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def plan_text(name: str, plan: Any) -> str:
    """The plan table of one recipe: every linear, its kernel, its bytes, why it is kept; then totals and notes."""
    rows = [
        (
            layer.layer,
            layer.role,
            f"{layer.in_features}x{layer.out_features}",
            f"W{layer.weight_bits}A{layer.activation_bits}" if layer.action == "quantize" else "kept",
            str(layer.sets) if layer.action == "quantize" else NONE,
            size(layer.fp_bytes),
            size(layer.weight_bytes),
            layer.kernel + (" (simulated)" if layer.simulated else ""),
            layer.transforms if layer.action == "quantize" else layer.reason,
        )
        for layer in plan.layers
    ]
    header = (
        "layer",
        "role",
        "in x out",
        "bits",
        "sets",
        "fp32",
        "weights",
        "kernel",
        "transforms, or why it is kept",
    )
    quantized = [layer for layer in plan.layers if layer.action == "quantize"]
    fp_bytes = sum(layer.fp_bytes for layer in quantized)
    share = f", {plan.weight_bytes / fp_bytes:.3f} of their {size(fp_bytes)} in FP32" if fp_bytes else ""
    totals = [
        f"{name}: {len(quantized)} of {len(plan.layers)} linears quantized, {number(plan.effective_bits, 2)} bits a weight",
        f"weights of one set {size(plan.weight_bytes)}{share}",
        f"resident {size(plan.resident_bytes)}, on disk {size(plan.disk_bytes)}",
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join([set_left(header, rows, columns=(0, 1, 2, 3, 7, 8)), "", *totals])


def set_left(header: Sequence[str], rows: Sequence[Sequence[str]], *, columns: Sequence[int]) -> str:
    """A table with the given columns set left: they are padded before `table` sees them."""
    cells = [list(header), *(list(row) for row in rows)]
    for i in columns:
        width = max(len(row[i]) for row in cells)
        for row in cells:
            row[i] = row[i].ljust(width)
    return table(cells[0], cells[1:])


def report_text(report: Mapping[str, Any]) -> str:
    """What a run ended with, as a table with a row for each recipe and lines on how it was measured."""
    recipes: Mapping[str, Mapping[str, Any]] = report.get("recipes") or {}
    lines = [_reference_line(report), _calibration_line(report)]
    if report.get("command") == "evaluate":
        return "\n".join([line for line in lines if line is not None] + _evaluation_lines(recipes))
    if report.get("sensitivity"):
        lines += ["", *_sensitivity_lines(report["sensitivity"])]
    if recipes:
        rows = [_RESULT_HEADER, *(_result_row(name, facts) for name, facts in recipes.items())]
        filled = [i for i in range(len(_RESULT_HEADER)) if any(row[i] != NONE for row in rows[1:])]
        header, *shown = ([row[i] for i in filled] for row in rows)
        lines += ["", table(header, shown), ""]
        lines += [_layers_line(name, facts) for name, facts in recipes.items() if facts.get("kernels")]
        if any(facts.get("simulated") for facts in recipes.values()):
            lines.append(
                "simulated: computed in full precision on the rounded values; it shows quality only, so it has no times."
            )
        lines += [f"left out: {facts['error']}" for facts in recipes.values() if facts.get("kind") == "failed"]
    lines += [_memory_line(name, facts) for name, facts in recipes.items() if facts.get("convert_peak_rss_bytes")]
    if any(facts.get("split") for facts in recipes.values()):
        lines += ["", *profile_lines(report)]
    lines += _sharing_lines(report)
    lines += _saved_lines(report.get("saved"))
    return "\n".join(line for line in lines if line is not None)


def profile_lines(report: Mapping[str, Any]) -> list[str]:
    """Where the time of a step goes, in tables, and what it cost beside the steps."""
    recipes = report["recipes"]
    lines = [table(*profile_text.split_rows(recipes))]
    for name, facts in recipes.items():
        if facts.get("roofline"):
            lines += ["", name, set_left(*profile_text.call_rows(facts), columns=(0, 4))]
    swaps = profile_text.swap_line(report)
    return [*lines, "", profile_text.run_line(report), *([] if swaps is None else [swaps])]


def _saved_lines(saved: Mapping[str, Any] | None) -> list[str]:
    """Where a saved model is, what it weighs, and whether it came back as it was."""
    if saved is None:
        return []
    verdict = {
        True: "Loaded again, it samples the same bits.",
        False: "Loaded again, it does NOT sample the same bits.",
    }
    lines = [
        "",
        f"The model is in {saved['folder']}: {size(saved['bytes'])}, of which {size(saved['denoiser_bytes'])} are the "
        f"denoiser's, {size(saved['fp_denoiser_bytes'])} in full precision.",
        verdict.get(saved["bit_equal"], "It was not loaded again."),
    ]
    return lines + ([f"It was uploaded to {saved['hub']}."] if saved["hub"] else [])


def _evaluation_lines(recipes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table for each bit-width, best first, and a line for each recipe that failed."""
    lines: list[str] = []
    clips = tables.has_clips(recipes)
    for section in tables.sections(recipes):
        lines += ["", section.title]
        if section.title == "failed":
            lines += [f"{name}: {recipes[name]['error']}" for name in section.recipes]
        else:
            rows = (tables.cells(name, recipes[name], clips=clips) for name in section.recipes)
            lines.append(table(tables.header(clips=clips), rows))
    return [*lines, "", tables.note(clips=clips)]


def _sensitivity_lines(found: Mapping[str, Any]) -> list[str]:
    """Every layer with the error of each bit-width, the most sensitive at the fewest bits first; roles; totals."""
    bits = found["bits"]
    kinds = {"denoiser": "denoiser_error", "own": "layer_error", "bytes": "bytes"}
    columns = [f"{kind} {label}" for kind in kinds for label in bits]

    def filled(one: Mapping[str, Any]) -> list[str]:
        cells = [(name, one["cells"][label][name]) for name in kinds.values() for label in bits]
        return [size(value) if name == "bytes" else f"{value:.2e}" for name, value in cells]

    layers = sorted(found["layers"], key=lambda layer: -layer["cells"][bits[-1]]["denoiser_error"])
    roles = [(name, str(role["layers"]), *filled(role)) for name, role in (found.get("roles") or {}).items()]
    totals = [
        f"{label}: errors add up to {t['denoiser_error']:.3e}; {size(t['bytes'])} in memory, {size(t['packed_bytes'])} packed"
        for label, t in found["totals"].items()
    ]
    return [
        table(("layer", "role", *columns), [(x["layer"], x["role"], *filled(x)) for x in layers], left=2),
        *(("", table(("role", "layers", *columns), roles)) if roles else ()),
        *(
            "",
            *totals,
            "Errors are squared error over squared output, of the denoiser and of the layer itself; roles add up.",
        ),
    ]


def budget_text(found: Any, *, packed: bool) -> str:
    """The choice of each input group, and what it comes to."""
    rows = [
        (choice.group, str(len(choice.layers)), choice.bits, size(choice.bytes), f"{choice.error:.3e}")
        for choice in found.choices
    ]
    how = "packed" if packed else "in memory"
    gap = "the least possible" if not found.gap else f"at most {found.gap:.1e} above the least possible"
    return "\n".join(
        [
            table(("input group", "layers", "bits", "bytes", "error"), rows),
            "",
            f"{found.recipe.name}: {found.bytes:,} of {found.budget:,} bytes {how}; summed error {found.error:.4e}, {gap}",
            "Layers that read one tensor share its transform, so each input group has one bit-width.",
        ]
    )


def _sharing_lines(report: Mapping[str, Any]) -> list[str]:
    """What the attention command measured and planned, and what the recipes with sharing did."""
    lines, found = [], report.get("similarity")
    if found:
        temporal = found.get("temporal")
        lines += _similarity_lines("within frames, " if temporal else "", found)
        lines += _similarity_lines("across frames, ", temporal) if temporal else []
    plans = {"plan": found["plan"]} if found and found.get("plan") else {}
    plans |= {name: row["sharing"] for name, row in (report.get("recipes") or {}).items() if row.get("sharing")}
    for name, plan in plans.items():
        blocks = "; ".join(" ".join(map(str, group)) or "none" for group in plan["blocks"]) or "none"
        saving = plan.get("predicted_saving")
        lines.append(
            f"{name}: shares blocks {blocks}; predicted output error {number(plan.get('predicted_error'), 4)}, attention "
            f"FLOPs saved {NONE if saving is None else f'{100 * saving:.1f} %'}"
        )
        lines += _further_sharing_lines(name, plan)
    return lines


def _similarity_lines(where: str, found: Mapping[str, Any]) -> list[str]:
    """How alike the branches attend, over all blocks of one kind and in each."""
    head = (
        f"{where}maps of both branches: mean cosine {number(found['map_cosine'], 4)}, "
        f"mean output error of sharing {number(found['output_error'], 4)}"
    )
    blocks = [f"{where}block {block}: output error {number(e, 4)}" for block, e in enumerate(found["block_error"])]
    return [head, *blocks]


def _further_sharing_lines(name: str, plan: Mapping[str, Any]) -> list[str]:
    """What a plan does beside sharing maps between the branches, and what was measured of it."""
    lines = []
    if any(plan.get("across_steps") or ()):
        blocks = "; ".join(" ".join(map(str, group)) or "none" for group in plan["across_steps"])
        lines.append(
            f"{name}: reuses blocks {blocks} at every second step; predicted output error "
            f"{number(plan.get('across_error'), 4)}, attention FLOPs saved {100 * (plan.get('across_saving') or 0):.1f} %"
        )
    below = plan.get("skip_unconditional_below")
    if below is not None:
        lines.append(
            f"{name}: skips the unconditional branch below timestep {below:g} (guidance {plan.get('skipped_guidance')}); "
            f"greatest change of the guidance in a step {number(plan.get('skipped_change'), 4)}, denoiser FLOPs saved "
            f"{100 * (plan.get('skipped_saving') or 0):.1f} %"
        )
    if plan.get("measured_prompts"):
        psnr = plan.get("measured_psnr_db")
        found = "pictures identical" if psnr is None else f"lowest PSNR {number(psnr)} dB"
        # Measured when the plan was made, in full precision: no word on the recipe of this line.
        where = f"over {_count(plan['measured_prompts'], 'prompt')}"
        lines.append(f"{name}: the plan by itself, in full precision: {found} {where}")
    return lines


_RESULT_HEADER = (
    "recipe", "PSNR dB", "SSIM", "temporal error", "motion", "SQNR dB", "step ms (p10-p90)", "run ms", "weights", "of FP32",
    "bits", "peak RAM",
)  # fmt: skip


def _result_row(name: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """One recipe's line; the noise floor is named so, identical pictures have no finite PSNR."""
    kind = facts.get("kind")
    label = {"reference": f"{name} (reference)", "noise_floor": f"{name} (noise floor)"}.get(str(kind), name)
    step, whole = facts.get("step_ms") or {}, facts.get("end_to_end_ms") or {}
    weights, full = facts.get("weight_bytes"), facts.get("fp_weight_bytes")
    return (
        label,
        "identical" if facts.get("identical") else number(facts.get("psnr"), 2),
        "identical" if facts.get("identical") else number(facts.get("ssim"), 4),
        number(facts.get("temporal_error_mean"), 2),
        number(facts.get("motion_ratio_mean"), 3),
        number(facts.get("mean_latent_sqnr_db"), 2),
        f"{number(step.get('median'))} ({number(step.get('p10'))}-{number(step.get('p90'))})" if step
        else ("simulated" if facts.get("simulated") else NONE),
        number(whole.get("median", facts.get("denoise_ms")), 0),
        size(weights),
        number(weights / full, 3) if weights and full else NONE,
        number(facts.get("effective_bits"), 2),
        size(facts.get("peak_rss_bytes")),
    )  # fmt: skip


def _layers_line(name: str, facts: Mapping[str, Any]) -> str:
    kernels = ", ".join(f"{kernel} x {count}" for kernel, count in facts["kernels"].items())
    rejected = len(facts.get("rejected") or ())
    return f"{name}: {kernels}" + (f"; transforms rejected by the do-no-harm gate: {rejected}" if rejected else "")


def _memory_line(name: str, facts: Mapping[str, Any]) -> str:
    """The peaks of the process while it converted and sampled, and the denoiser's file beside one in bfloat16."""
    peaks = f"{name}: peak memory {size(facts['convert_peak_rss_bytes'])} while it was converted"
    if facts.get("peak_rss_bytes"):
        peaks += f", {size(facts['peak_rss_bytes'])} while it sampled"
    packed, half = facts.get("file_bytes"), facts.get("bf16_file_bytes")
    return (
        f"{peaks}; {size(packed)} in a file, {packed / half:.3f} of {size(half)} in bfloat16"
        if packed and half
        else peaks
    )


def _reference_line(report: Mapping[str, Any]) -> str:
    machine, reference = report.get("machine") or {}, report.get("reference") or {}
    parts = [
        str(report.get("model", "")),
        f"reference {reference['label']}" if reference.get("label") else "",
    ]
    parts += [
        str(machine.get("gpu") or machine.get("cpu") or ""),
        _count(machine["threads"], "thread") if machine.get("threads") else "",
    ]
    parts += [_count(len(report["prompts"]), "prompt") if report.get("prompts") else ""]
    return ", ".join(part for part in parts if part)


def _count(count: int | None, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _calibration_line(report: Mapping[str, Any]) -> str | None:
    found = report.get("calibration")
    if not found:
        return None
    how = "reused" if found.get("reused") else f"made in {number(found.get('seconds'))} s"
    size_of_it = f"{_count(found.get('prompts'), 'prompt')}, {_count(found.get('steps'), 'step')}"
    return f"calibration {str(found.get('fingerprint', ''))[:12]}: {size_of_it}, {how}"


class ProgressBar:
    """Shows a run's events on a stream: a line for each stage, and on a terminal a bar under it."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._bar: Any = None
        self._key: tuple[Any, Any] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event.get("kind")
        if kind == "stage":
            self.close()
            self._say(str(event.get("label") or event.get("stage")))
        elif kind == "progress":
            self._advance(event)
        elif kind == "warning":
            self._say(f"warning: {event.get('text')}")

    def close(self) -> None:
        """End the bar that is shown, leaving it in place."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _advance(self, event: Event) -> None:
        if not self._live:
            return
        key = (event.get("stage"), event.get("recipe"))
        if self._bar is None or key != self._key:
            from tqdm import tqdm

            self.close()
            form = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self._bar = tqdm(total=event.get("total"), file=self._stream, dynamic_ncols=True, bar_format=form)
            self._key = key
        self._bar.set_postfix_str(str(event.get("detail") or ""), refresh=False)
        self._bar.update(int(event.get("done", 0)) - self._bar.n)

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
