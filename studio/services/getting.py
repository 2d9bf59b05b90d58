"""Getting models from the page: the closed list, an id where the studio was started so, and the download as a job."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from studio.jobs import Event, Work
from studio.services.core import Core
from trdq_core.errors import ModelError
from trdq_core.hub.files import check_id
from trdq_core.hub.known import KNOWN_MODELS

NOT_HERE = "Models are not fetched on this server; run the studio on a machine of your own."


def choices(core: Core) -> list[tuple[str, str]]:
    """The models of the closed list that are not on this machine, for a dropdown."""
    here = {info.name for info in core.runs.models() if info.available}
    return [(f"{model.name} · {model.description}", model.name) for model in KNOWN_MODELS if model.name not in here]


def line(name: Any) -> str:
    """Which repository and revision a download would fetch."""
    model = next((model for model in KNOWN_MODELS if model.name == name), None)
    if model is None:
        return ""
    pinned = f"{model.repo}, revision {str(model.revision)[:8]}"
    said = f"{pinned}. Safetensors only; size and free disk are looked at before it begins."
    return f'<p class="tr-small">{escape(said)}</p>'


def asked(name: Any, typed: Any, allow_hub: bool) -> str:
    """What to fetch: the typed id where ids may be typed, else the chosen name; ModelError for anything else."""
    text = str(typed or "").strip()
    if text and allow_hub:
        return check_id(text)
    if text:
        raise ModelError(
            "model: ids are typed only where the studio was started with --allow-hub; choose from the list."
        )
    if name not in {model.name for model in KNOWN_MODELS}:
        raise ModelError(f"model: got {str(name or '')[:80]!r}; choose one of the list.")
    return str(name)


def download_work(core: Core, name: str) -> Work:
    """Work that fetches a model; its result is the name to pick it by. This machine's token serves the closed list only."""
    anonymous = name not in {model.name for model in KNOWN_MODELS}

    def work(on_event: Callable[[Event], None], cancelled: Callable[[], bool]) -> str:
        found = core.runs.download(name, on_event=on_event, cancelled=cancelled, anonymous=anonymous)
        return str(found.name)

    return work


def command(name: Any, typed: Any = "") -> str:
    """The command line that fetches the same."""
    wished = str(typed or "").strip() or str(name or "")
    try:
        known = wished in {model.name for model in KNOWN_MODELS} or bool(check_id(wished))
    except ModelError:
        known = False
    return f"python -m trdq_core download {wished}" if known else ""
