"""The core as the studio sees it: five modules, imported when first used so that the page is up before torch is."""

from __future__ import annotations

import importlib
import logging
import threading
from functools import cached_property
from typing import Any, Protocol

from trdq_core.errors import TRDQError

log = logging.getLogger(__name__)


class Core(Protocol):
    """What `docs/interfaces.md` promises. Tests put a fake in its place."""

    @property
    def runs(self) -> Any:
        """`trdq_core.runs` or what stands in for it."""

    @property
    def inspection(self) -> Any:
        """`trdq_core.inspection` or what stands in for it."""

    @property
    def similarity(self) -> Any:
        """`trdq_core.similarity` or what stands in for it."""

    @property
    def timegroups(self) -> Any:
        """`trdq_core.timegroups` or what stands in for it."""

    @property
    def budget(self) -> Any:
        """`trdq_core.budget` or what stands in for it."""

    def backend_label(self) -> str:
        """The kernels that run here in a few words; "loading" until it is known."""

    def gpu_name(self) -> str:
        """The GPU that runs the models; empty where the CPU does."""


class InstalledCore:
    """The real core."""

    def __init__(self) -> None:
        self._backend, self._gpu = "loading", ""

    def backend_label(self) -> str:
        """The kernels that run here in a few words; "loading" until `warm_up` has seen them."""
        return self._backend

    def gpu_name(self) -> str:
        """The GPU that runs the models; empty where the CPU does, and until `warm_up` has looked."""
        return self._gpu

    def load(self) -> None:
        """Import what takes seconds, and build the kernels if they are not built yet."""
        cuda = importlib.import_module("torch").cuda
        if cuda.is_available():
            self._gpu = str(cuda.get_device_name(0))
        facts = importlib.import_module("trdq_core.kernels.dispatch").describe()
        titles = {"cpp": "C++", "torch": "torch", "triton": "Triton", "reference": "reference"}
        title = titles.get(facts["backend"], str(facts["backend"]))
        vnni = facts["backend"] == "cpp" and facts.get("vectorised")
        self._backend = f"{title}, AVX512-VNNI" if vnni else title
        _ = self.inspection, self.similarity

    @cached_property
    def runs(self) -> Any:
        """`trdq_core.runs`; importing it is fast."""
        return importlib.import_module("trdq_core.runs")

    @cached_property
    def inspection(self) -> Any:
        """`trdq_core.inspection`; importing it loads torch."""
        return importlib.import_module("trdq_core.inspection")

    @cached_property
    def similarity(self) -> Any:
        """`trdq_core.similarity`; importing it loads torch."""
        return importlib.import_module("trdq_core.similarity")

    @cached_property
    def timegroups(self) -> Any:
        """`trdq_core.timegroups`; importing it loads torch."""
        return importlib.import_module("trdq_core.timegroups")

    @cached_property
    def budget(self) -> Any:
        """`trdq_core.budget`; importing it loads torch."""
        return importlib.import_module("trdq_core.budget")


def warm_up(core: InstalledCore) -> threading.Thread:
    """Load torch and the core in the background, so that the first plan does not wait for it."""

    def load() -> None:
        try:
            core.load()
        except (ImportError, TRDQError) as error:
            log.warning("The core could not be loaded ahead of time: %s", error)

    thread = threading.Thread(target=load, name="warm-up", daemon=True)
    thread.start()
    return thread
