"""The prompts that the page offers for a model: examples for the text box, and sets for calibrating and measuring."""

from __future__ import annotations

from functools import cache

from trdq_core.errors import StorageError
from trdq_core.models import models
from trdq_core.prompts import CALIBRATION_PROMPTS, FALLBACK_PROMPTS, stored_prompts

PICTURES = "pocket-image"  # the model whose prompts stand in for those of a name that is not listed
# What people know at a glance, for pictures and for clips; those that a model's lists hold are offered first.
EASY_TO_JUDGE = ("red apple", "owl", "watermelon", "penguin", "octopus", "a panda and a chocolate bar")
EASY_MOVING = ("whale", "turtle", "tram car", "camel", "teddy bear", "speedboat")
EXAMPLES = 6


@cache
def _stored(model: str) -> dict[str, tuple[str, ...]]:
    """The lists of a listed model by name; empty if its file cannot be read. A path from the page is never looked at."""
    listed = {info.name for info in models()}
    try:
        return stored_prompts(model if model in listed else PICTURES)
    except StorageError:
        return {}


def examples(model: str) -> list[str]:
    """A handful of prompts to click on; the first is the default."""
    stored = _stored(model)
    moving = any(info.name == model and info.kind == "video" for info in models())
    easy = [
        text for text in (EASY_MOVING if moving else EASY_TO_JUDGE) if any(text in texts for texts in stored.values())
    ]
    if "examples" not in stored and len(easy) > 2:
        return easy[:EXAMPLES]
    return list((stored.get("examples") or stored.get("evaluation") or FALLBACK_PROMPTS)[:EXAMPLES])


def calibration(model: str) -> tuple[str, ...]:
    """The prompts to calibrate on: those that the command line takes, so that both find each other's calibrations."""
    return _stored(model).get("calibration", FALLBACK_PROMPTS)[:CALIBRATION_PROMPTS]


def evaluation(model: str, count: int, besides: str) -> tuple[str, ...]:
    """`count` prompts to measure on besides the typed one; fewer if there are not that many."""
    stored = _stored(model)
    pool = stored.get("evaluation") or stored.get("examples") or FALLBACK_PROMPTS
    return tuple(text for text in pool if text != besides)[:count]


def kept(model: str, before: str) -> str:
    """The prompt to show once `model` was chosen: the typed one, unless it is empty or another model's own."""
    text = before.strip()
    known = {known for texts in _stored(model).values() for known in texts}
    foreign = {known for info in models() for texts in _stored(info.name).values() for known in texts}
    return before if text and (text in known or text not in foreign) else examples(model)[0]
