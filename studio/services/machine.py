"""Facts about this machine for the header, read without torch."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil


class MachineFacts(NamedTuple):
    """What the header shows. `own_bytes` is what this process holds."""

    device: str
    threads: int
    ram_total: int
    ram_free: int
    own_bytes: int


@cache
def cpu_name() -> str:
    """The processor's name without marketing marks; "CPU" where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "CPU"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if found is None:
        return "CPU"
    return re.sub(r"\((?:R|TM|r|tm)\)|CPU|Processor|@.*$|\s+", " ", found.group(1)).strip() or "CPU"


def facts(gpu: str = "") -> MachineFacts:
    """The facts now; `gpu` is the name of the GPU where one runs the models."""
    memory = psutil.virtual_memory()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return MachineFacts(gpu or cpu_name(), threads, memory.total, memory.available, psutil.Process().memory_info().rss)
