"""The part of the fake core that lists and fetches models, and says what one needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from trdq_core.errors import Cancelled


class ModelInfo(NamedTuple):
    name: str
    path: Path
    kind: str
    description: str
    available: bool
    reason: str
    source: str = "repository"
    repo: str | None = None
    revision: str | None = None


class FakeGetting:
    """`memory` is what every model is said to need; `fetched` is what was asked for, and whether without a token."""

    def __init__(self) -> None:
        self.memory: Any = None
        self.fetched: list[tuple[str, bool]] = []
        self.break_with: Exception | None = None

    def preflight(self, model: str, device: str | None = None) -> Any:
        return self.memory

    def download(
        self, name: str, *, on_event: Callable[[dict[str, Any]], None], cancelled: Callable[[], bool], anonymous: bool
    ) -> Any:
        self.fetched.append((name, anonymous))
        on_event({"kind": "stage", "stage": "download", "label": f"Downloading {name}", "recipe": None})
        if cancelled():
            raise Cancelled("Cancelled during the download; the files that arrived whole are kept.")
        if self.break_with is not None:
            raise self.break_with
        return SimpleNamespace(name="pocket-image")
