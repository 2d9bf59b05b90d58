"""From pictures or clips and latents of one recipe to the numbers of its row: means, spreads, standard errors."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trdq_core import metrics, perceptual
from trdq_core.evaluation.references import Sample, StoredBatch
from trdq_core.evaluation.tables import CLIP_METRICS
from trdq_core.sampling import SampledModel

SAMPLE_COLUMNS = ("prompt", "seed", "psnr", "ssim", "final_latent_sqnr_db", "encoder_feature_distance", "gmsd")
CLIP_SAMPLE_COLUMNS = ("temporal_error", "motion_ratio", "worst_frame")


@dataclass
class Scores:
    """What was measured of each sample, in the order of the samples. What is measured of a picture is the mean over the
    frames of a clip, which count as one sample: they are too much alike to be several."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    curves: list[list[float]] = field(default_factory=list)  # SQNR in dB after each step
    feature_distance: list[float] = field(default_factory=list)
    gmsd: list[float] = field(default_factory=list)
    pooled: list[Tensor] = field(default_factory=list)
    reference_pooled: list[Tensor] = field(default_factory=list)
    clips: list[metrics.ClipMetrics] = field(default_factory=list)

    def add(
        self, model: SampledModel, pictures: np.ndarray, stored: StoredBatch, curves: Sequence[Sequence[float]]
    ) -> None:
        """Take in a batch: its pictures (n, h, w, 3) or clips (n, frames, h, w, 3), what the reference left, and its n curves
        over the steps."""
        found = [metrics.likeness(a, b) for a, b in zip(pictures, stored.pictures, strict=True)]
        self.psnr += [one.psnr for one in found]
        self.ssim += [one.ssim for one in found]
        self.clips += [one.clip for one in found if one.clip is not None]
        self.curves += [list(curve) for curve in curves]
        n, frames = len(pictures), [values.reshape(-1, *values.shape[-3:]) for values in (pictures, stored.pictures)]
        own, other = (model.encoder_features(values) for values in frames)
        self.feature_distance += perceptual.feature_distance(own, other).reshape(n, -1).mean(1).tolist()
        self.gmsd += perceptual.gmsd(*frames).reshape(n, -1).mean(1).tolist()
        self.pooled.append(perceptual.pooled(own).unflatten(0, (n, -1)).mean(1))
        self.reference_pooled.append(perceptual.pooled(other).unflatten(0, (n, -1)).mean(1))

    def row(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The quality part of a report row."""
        curve = [metrics.finite_mean(values) for values in zip(*self.curves, strict=True)]
        prompts = [sample.prompt for sample in samples]
        return {
            "n": len(samples),
            "identical": all(math.isinf(value) for value in self.psnr),
            "identical_pictures": sum(math.isinf(value) for value in self.psnr),
            **summary("psnr", self.psnr, prompts),
            **summary("ssim", self.ssim, prompts),
            **summary("final_latent_sqnr_db", [curve[-1] for curve in self.curves], prompts),
            **summary("encoder_feature_distance", self.feature_distance, prompts),
            **summary("gmsd", self.gmsd, prompts),
            **self._kid(),
            **self._flicker(prompts),
            "latent_sqnr_db": curve,
            "mean_latent_sqnr_db": metrics.finite_mean([value for value in curve if value is not None]),
        }

    def _kid(self) -> dict[str, Any]:
        """The distribution distance, or why there is none."""
        own, other = torch.cat(self.pooled), torch.cat(self.reference_pooled)
        if len(own) < perceptual.KID_LEAST:
            reason = f"{len(own)} pictures; at least {perceptual.KID_LEAST} are needed"
            return {"encoder_kid": None, "encoder_kid_reason": reason}
        return {"encoder_kid": perceptual.kernel_distance(own, other), "encoder_kid_reason": None}

    def _flicker(self, prompts: Sequence[int]) -> dict[str, Any]:
        """What only clips have: how much they flicker, and how much they move beside the reference. A clip whose reference
        stands still has no ratio."""
        fields: dict[str, Any] = {}
        for name in CLIP_METRICS if self.clips else ():
            values = [getattr(clip, name) for clip in self.clips]
            found = summary(name, [math.inf if value is None else value for value in values], prompts)
            fields |= {f"{name}_mean": found.pop(name), **found}
        return fields

    def samples_csv(self, samples: Sequence[Sample]) -> str:
        """One line for each picture or clip; an infinite value is written "inf"."""
        finals = [curve[-1] for curve in self.curves]
        columns = zip(samples, self.psnr, self.ssim, finals, self.feature_distance, self.gmsd, strict=True)
        lines = [[*sample, *(f"{value:.7g}" for value in values)] for sample, *values in columns]
        for line, clip in zip(lines, self.clips, strict=False):  # none of pictures
            values = [getattr(clip, name) for name in CLIP_SAMPLE_COLUMNS]
            line += ["" if value is None else f"{value:.7g}" for value in values]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*SAMPLE_COLUMNS, *(CLIP_SAMPLE_COLUMNS if self.clips else ())])
        writer.writerows(lines)
        return text.getvalue()


def summary(name: str, values: Sequence[float], prompts: Sequence[int]) -> dict[str, float | None]:
    """Mean, standard deviation over pictures and standard error of the mean; infinite values are left out of all three.

    Pictures of one prompt are alike, so the error is that of the mean over prompts, seeds averaged first; with one
    prompt it is that over its pictures.
    """
    pairs = [(value, prompt) for value, prompt in zip(values, prompts, strict=True) if math.isfinite(value)]
    kept = [value for value, _ in pairs]
    grouped: dict[int, list[float]] = {}
    for value, prompt in pairs:
        grouped.setdefault(prompt, []).append(value)
    means = [sum(group) / len(group) for group in grouped.values()]
    units = means if len(means) > 1 else kept
    return {
        name: sum(kept) / len(kept) if kept else None,
        f"{name}_std": float(np.std(kept, ddof=1)) if len(kept) > 1 else None,
        f"{name}_se": float(np.std(units, ddof=1)) / math.sqrt(len(units)) if len(units) > 1 else None,
    }
