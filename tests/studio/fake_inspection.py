"""`trdq_core.inspection` with made-up values, and the layers of the fake picture model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.studio import fake_clips
from trdq_core.errors import CalibrationError
from trdq_core.specs import Recipe

LAYERS = tuple(
    f"transformer_blocks.{block}.{name}" for block in range(3) for name in ("attn1.to_q", "attn2.to_q", "ff.net.0.proj")
)


class FakeInspection:
    """`trdq_core.inspection` with made-up values."""

    def layers(self, calibration: Path) -> list[str]:
        model = json.loads((calibration / "facts.json").read_text())["model"]
        return list(fake_clips.LAYERS if model == "pocket-video" else LAYERS)

    def channel_timeline(self, calibration: Path, layer: str) -> Any:
        random = np.random.default_rng(len(layer))
        timesteps = np.linspace(999, 20, 20)
        scale = np.exp(random.normal(size=96))
        return SimpleNamespace(timesteps=timesteps, absmax=np.outer(0.3 + timesteps / 1000, scale) + 0.05)

    def histograms(self, calibration: Path, model: str, recipe: Recipe, layer: str, group: int) -> Any:
        if layer not in (*LAYERS, *fake_clips.LAYERS):
            raise CalibrationError(f"{layer}: it was not observed.")
        random = np.random.default_rng(group)
        before, after = random.standard_t(3, 20000), random.normal(size=20000) * 1.5
        edges = np.linspace(min(before.min(), after.min()), max(before.max(), after.max()), 121)
        return SimpleNamespace(
            edges=edges, before=np.histogram(before, edges)[0], after=np.histogram(after, edges)[0],
            before_facts=_facts(before), after_facts=_facts(after), rows=256, kept=True, note="The transform is kept.",
        )  # fmt: skip

    def group_edges(self, recipe: Recipe, timesteps: Any, calibration: Path | None = None) -> list[float]:
        count = recipe.time.count
        return [1000 * index / count for index in range(1, count)]

    def group_labels(self, recipe: Recipe, timesteps: Any, calibration: Path | None = None) -> list[str]:
        count = recipe.time.count
        return [f"{1000 * i // count} to {1000 * (i + 1) // count}" for i in range(count)]


def _facts(values: Any) -> Any:
    kurtosis = float(((values - values.mean()) ** 4).mean() / values.var() ** 2)
    absmax = float(np.abs(values).max())
    peak = absmax / float(np.sqrt((values**2).mean()))
    return SimpleNamespace(absmax=absmax, kurtosis=kurtosis, clipped_share=0.0012, sqnr_db=28.4, peak=peak)
