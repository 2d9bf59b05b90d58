"""What the pages share: the core, the one worker, and the services over them."""

from __future__ import annotations

from dataclasses import dataclass

from studio.jobs import Worker
from studio.services.core import Core
from studio.services.edits import Edits
from studio.services.plans import Plans
from studio.services.recipes import SavedRecipes
from studio.services.scans import Scans
from studio.services.similarity import Similarities
from studio.services.statistics import Statistics
from studio.services.stored import StoredRuns


@dataclass(frozen=True)
class Settings:
    """How the studio was started: whether it fetches models at all, whether a visitor may type an id, whether `local`.

    A local studio is served to this machine alone, so that places on its disk may be named on the page.
    """

    downloads: bool = True
    allow_hub: bool = False
    local: bool = False


@dataclass(frozen=True)
class Studio:
    """One studio; every visitor of it shares the worker."""

    core: Core
    worker: Worker
    plans: Plans
    runs: StoredRuns
    statistics: Statistics
    similarities: Similarities
    scans: Scans
    recipes: SavedRecipes
    edits: Edits
    settings: Settings = Settings()

    @classmethod
    def over(cls, core: Core, settings: Settings = Settings()) -> Studio:
        """A studio over a core."""
        plans = Plans(core)
        return cls(
            core, Worker(), plans, StoredRuns(core), Statistics(core), Similarities(core), Scans(core), SavedRecipes(core),
            Edits(plans), settings,
        )  # fmt: skip
