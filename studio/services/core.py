"""The core as the studio sees it: five modules, imported when first used so that the page is up before torch is."""

from __future__ import annotations

import importlib
import logging
import threading
from functools import cached_property
from typing import Any, Protocol

from studio.services import gpu
from trdq_core.errors import TRDQError

log = logging.getLogger(__name__)
TITLES = {"cpp": "C++", "torch": "torch", "triton": "Triton", "reference": "reference"}
ON_LENT_GPU = "chosen at each run"


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
        torch = importlib.import_module("torch")
        device = None
        if torch.cuda.is_available():
            self._gpu = str(torch.cuda.get_device_name(0))
            device = torch.device("cuda", 0)
        if device is not None and gpu.lent():  # this process never holds that GPU, so its kernels cannot be tried here
            self._backend = ON_LENT_GPU
        else:
            self._backend = _backend_words(importlib.import_module("trdq_core.kernels.dispatch").describe(device))
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


def _backend_words(facts: dict[str, Any]) -> str:
    """The backend that `dispatch.describe` found, in a few words."""
    name = str(facts["backend"])
    title = TITLES.get(name, name)
    return f"{title}, AVX512-VNNI" if name == "cpp" and facts.get("vectorised") else title


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
