"""Spatial and temporal blocks of video models, told apart by the names of their layers."""

from __future__ import annotations

from collections.abc import Iterable

SPATIAL, TEMPORAL = "spatial", "temporal"
PART_CHOICES = [("Spatial", SPATIAL), ("Temporal", TEMPORAL)]


def part_of(name: str) -> str:
    """Where a layer or a block attends: across the frames of a clip, or within one as in every model of pictures."""
    return TEMPORAL if "tempora" in name else SPATIAL


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The names by part, in their order; a part without any is left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return {part: found[part] for _, part in PART_CHOICES if part in found}
