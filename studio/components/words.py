"""Numbers as people read them."""

from __future__ import annotations

from typing import Any


def size(count: float | None) -> str:
    """Bytes with a unit."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def duration(seconds: float | None) -> str:
    """Seconds as "8 s", "1 min 20 s" or "2 h 5 min"."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def milliseconds(value: float | None) -> str:
    """Milliseconds below ten seconds, seconds above."""
    if value is None:
        return "–"
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def spread(times: dict[str, Any] | None) -> tuple[str, str]:
    """The median, and "p10–p90 …, n = …" for a timing."""
    if not times or times.get("median") is None:
        return "–", ""
    if times.get("n") == 1:
        return milliseconds(times["median"]), "one measurement, n = 1"
    tail = f"p10–p90 {milliseconds(times.get('p10'))} to {milliseconds(times.get('p90'))}, n = {times.get('n', '?')}"
    return milliseconds(times["median"]), tail


def times(value: float | None, of: float | None) -> str:
    """The share that `value` is of `of`, as "0.26x"."""
    if not value or not of:
        return ""
    return f"{value / of:.2f}x"


def layer(name: str) -> str:
    """A layer's name without what all of them begin with."""
    return name.replace("transformer_blocks.", "blocks.")


def in_part(name: str) -> str:
    """A layer's name among those of its part, spatial or temporal, which then goes without saying."""
    return layer(name.removeprefix("temporal_"))


def plural(count: int, one: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"
