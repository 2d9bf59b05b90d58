"""Rows of an evaluation as CSV, Markdown and cells for a terminal: one table for each bit-width, best first. No torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

NONE = "-"
QUALITY = ("psnr", "ssim", "final_latent_sqnr_db", "encoder_feature_distance", "gmsd")
CSV_COLUMNS = (
    "recipe", "kind", "method", "bits", "n",
    *(f"{name}{suffix}" for name in QUALITY for suffix in ("", "_std", "_se")),
    "mean_latent_sqnr_db", "encoder_kid", "encoder_kid_reason", "identical_pictures",
    "effective_bits", "packed_bits", "weight_bytes", "fp_weight_bytes", "calibration_seconds", "fit_seconds",
    "denoise_seconds_per_picture", "simulated", "kernels", "rejected", "latent_sqnr_db", "error",
)  # fmt: skip
CLIP_METRICS = ("temporal_error", "motion_ratio")
CLIP_COLUMNS = tuple(f"{name}{suffix}" for name in CLIP_METRICS for suffix in ("_mean", "_std", "_se"))
CLIP_HEADER = ("temporal error", "motion")  # before the arithmetic
HEADER = (
    "recipe", "bits a weight", "packed", "SQNR dB", "PSNR dB", "SSIM", "feature distance", "GMSD", "KID x1000", "fit s",
    "arithmetic",
)  # fmt: skip
NOTE = (
    "SQNR: latents after the last step; feature distance: encoder feature distance, stages of the model's own autoencoder; "
    "KID: encoder KID on their channel means, paired; ± is one standard error over prompts."
)
CLIP_NOTE = (
    "Of a clip each is the mean over its frames; temporal error: RMS of (frame difference - the reference's), grey levels; "
    "motion: mean squared frame difference over the reference's."
)

Rows = Mapping[str, Mapping[str, Any]]


class Section(NamedTuple):
    """The recipes of one bit-width, best latent SQNR first."""

    title: str
    recipes: tuple[str, ...]


def sections(rows: Rows) -> list[Section]:
    """Reference and noise floor, then the bit-widths from most to fewest bits, mixed ones, and what failed."""
    floor = tuple(name for name, row in rows.items() if row.get("kind") in ("reference", "noise_floor"))
    found: dict[str, list[str]] = {}
    failed = tuple(name for name, row in rows.items() if row.get("kind") == "failed")
    for name, row in rows.items():
        if name not in (*floor, *failed):
            found.setdefault(str(row.get("bits")), []).append(name)
    ordered = [
        Section(bits, tuple(sorted(names, key=lambda name: _rank(rows[name]))))
        for bits, names in sorted(found.items(), key=lambda item: widths(item[0]), reverse=True)
    ]
    return [
        section for section in (Section("reference", floor), *ordered, Section("failed", failed)) if section.recipes
    ]


def widths(label: str) -> tuple[int, ...]:
    """Sorts bit labels: (4, 8) of "W4A8", () of "mixed"."""
    return tuple(map(int, re.findall(r"\d+", label)))


def _rank(row: Mapping[str, Any]) -> float:
    """Sorts by SQNR, largest first; without a finite one all pictures are those of the reference."""
    value = row.get("final_latent_sqnr_db")
    return float("-inf") if value is None else -value


def has_clips(rows: Rows) -> bool:
    """Whether the recipes were measured on clips."""
    return any("temporal_error_mean" in row for row in rows.values())


def header(*, clips: bool = False) -> tuple[str, ...]:
    """Titles of the columns that `cells` fills."""
    return (*HEADER[:-1], *CLIP_HEADER, HEADER[-1]) if clips else HEADER


def note(*, clips: bool = False) -> str:
    """What the columns are, for below or above a table."""
    return f"{NOTE} {CLIP_NOTE}" if clips else NOTE


def cells(name: str, row: Mapping[str, Any], *, clips: bool = False) -> tuple[str, ...]:
    """One recipe's cells under `header`."""
    *plain, arithmetic = _picture_cells(name, row)
    flicker = (_spread(row, "temporal_error", 2), _spread(row, "motion_ratio", 3)) if clips else ()
    return (*plain, *flicker, arithmetic)


def _picture_cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells under HEADER."""
    if row.get("kind") == "reference":
        label = f"{name} ({row.get('label', 'reference')})"
        return (label, *_bits(row), *(NONE,) * 7, "float")
    floor = row.get("kind") == "noise_floor"
    simulated = row.get("simulated")
    return (
        f"{name} (noise floor)" if floor else name,
        *_bits(row),
        "identical" if row.get("identical") else _spread(row, "final_latent_sqnr_db", 2),
        "identical" if row.get("identical") else _spread(row, "psnr", 2),
        _number(row.get("ssim"), 4),
        _short(row.get("encoder_feature_distance")),
        _short(row.get("gmsd")),
        _number(None if row.get("encoder_kid") is None else 1000 * row["encoder_kid"], 2),
        _number(row.get("fit_seconds"), 1),
        NONE if simulated is None else "simulated" if simulated else "real",
    )


def _bits(row: Mapping[str, Any]) -> tuple[str, str]:
    return _number(row.get("effective_bits"), 2), _number(row.get("packed_bits"), 2)


def _spread(row: Mapping[str, Any], name: str, digits: int) -> str:
    error = row.get(f"{name}_se")
    return _number(row.get(f"{name}_mean", row.get(name)), digits) + ("" if error is None else f" ± {error:.{digits}f}")


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def csv_text(report: Mapping[str, Any]) -> str:
    """One row for each recipe; the SQNR after each step in one cell with blanks between, kernels as "name x count"."""
    text = io.StringIO()
    columns = (*CSV_COLUMNS, *(CLIP_COLUMNS if has_clips(report["recipes"]) else ()))
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for name, row in report["recipes"].items():
        curve, kernels = row.get("latent_sqnr_db") or (), row.get("kernels") or {}
        joined = {
            "latent_sqnr_db": " ".join("inf" if value is None else f"{value:.4f}" for value in curve),
            "kernels": "; ".join(f"{kernel} x {count}" for kernel, count in kernels.items()),
            "rejected": len(row["rejected"]) if "rejected" in row else None,
        }
        writer.writerow({"recipe": name, **row, **joined})
    return text.getvalue()


def markdown(report: Mapping[str, Any]) -> str:
    """The whole evaluation as Markdown."""
    rows, about = report["recipes"], report.get("evaluation") or {}
    spec, clips = report.get("spec") or {}, has_clips(rows)
    lines = [
        f"# {report.get('model', '')}: evaluation",
        "",
        f"{about.get('prompts')} prompts, {about.get('seeds')} seeds each, {spec.get('steps')} steps, guidance "
        f"{spec.get('guidance')}, first seed {spec.get('seed')}. {note(clips=clips)}",
    ]
    for section in sections(rows):
        lines += ["", f"## {section.title}", ""]
        if section.title == "failed":
            lines += [f"- {name}: {rows[name]['error']}" for name in section.recipes]
        else:
            filled = (cells(name, rows[name], clips=clips) for name in section.recipes)
            lines += _markdown_table(header(clips=clips), filled)
    return "\n".join([*lines, ""])


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return [*head, *("| " + " | ".join(row) + " |" for row in rows)]
