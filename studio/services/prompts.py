"""The prompts that the page offers: examples for the text box, and sets for calibrating and measuring."""

from __future__ import annotations

import json
from functools import cache

from trdq_core.arguments import CALIBRATION_PROMPTS, FALLBACK_PROMPTS, PROMPTS_FILE


@cache
def _stored() -> dict[str, tuple[str, ...]]:
    """The lists in assets/prompts.json by name; empty if the file is not there."""
    try:
        data = json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(data, list):
        data = {"examples": data}
    if not isinstance(data, dict):
        return {}
    return {
        name: tuple(text for text in texts if isinstance(text, str) and text.strip())
        for name, texts in data.items()
        if isinstance(texts, list)
    }


# Pictures that people know at a glance; those that the lists hold are offered first.
EASY_TO_JUDGE = ("red apple", "owl", "watermelon", "penguin", "octopus", "a panda and a chocolate bar")


def examples() -> list[str]:
    """A handful of prompts to click on; the first is the default."""
    stored = _stored()
    easy = [text for text in EASY_TO_JUDGE if any(text in texts for texts in stored.values())]
    if "examples" not in stored and len(easy) > 2:
        return easy
    return list((stored.get("examples") or stored.get("evaluation") or FALLBACK_PROMPTS)[:6])


def calibration() -> tuple[str, ...]:
    """The prompts to calibrate on: those that the command line takes, so that both find each other's calibrations."""
    return _stored().get("calibration", FALLBACK_PROMPTS)[:CALIBRATION_PROMPTS]


def evaluation(count: int, besides: str) -> tuple[str, ...]:
    """`count` prompts to measure on besides the typed one; fewer if there are not that many."""
    stored = _stored()
    pool = stored.get("evaluation") or stored.get("examples") or FALLBACK_PROMPTS
    return tuple(text for text in pool if text != besides)[:count]
