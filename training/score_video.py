"""The video half of `python -m training.score`: recall of known clips, and whether what comes back moves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline, LattePipeline

from training.retrieval import evenly
from training.video_data import WINDOWS, Clips, load
from training.video_retrieval import STEPS, change, distance_to, generate, rank_of_true, sheet

NAMES = 32


def psnr_of(generated: np.ndarray, windows: np.ndarray) -> float:
    """Mean PSNR in dB of clips (count, frames, 64, 64, 3) against the better window of (count, WINDOWS, frames, ...)."""
    error = np.square((generated[:, None].astype(np.float32) - windows) / 255).mean((2, 3, 4, 5)).min(1)
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))


def names_score(pipeline: LattePipeline, clips: Clips, guidance: float, file: Path | None = None) -> dict:
    """Recall and motion of known names at one guidance scale; writes the contact sheet if a file is given."""
    chosen = evenly(len(clips.names), NAMES)
    started = time.time()
    generated = generate(pipeline, [clips.names[i] for i in chosen], guidance)
    seconds = time.time() - started
    ranks, nearest = rank_of_true(generated, clips.frames, chosen)
    true = clips.frames[chosen]
    moved, known = change(generated), change(true.reshape(-1, *true.shape[2:])).reshape(len(chosen), WINDOWS).mean(1)
    if file:
        sheet(generated, nearest, chosen, clips, file)
    return {
        "guidance_scale": guidance,
        "top1": float(np.mean(ranks == 0)),
        "top5": float(np.mean(ranks < 5)),
        "mean_distance": round(float(distance_to(generated, true).diagonal().mean()), 3),
        "mean_psnr_db": round(psnr_of(generated, true), 2),
        "change": round(float(moved.mean()), 5),
        "change_of_training_clips": round(float(known.mean()), 5),
        "change_ratio": round(float(moved.mean() / known.mean()), 3),
        "median_change_ratio": round(float(np.median(moved / known)), 3),
        "change_ratios": {clips.names[i]: round(float(r), 3) for i, r in zip(chosen, moved / known, strict=True)},
        "missed": [clips.names[i] for i, rank in zip(chosen, ranks, strict=True) if rank],
        "seconds_per_clip": round(seconds / len(chosen), 3),
    }


def score(folder: Path, guidance: float) -> dict:
    """Everything in `score.json`."""
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    clips = load().of_names(facts["names"])
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return {
        "names": min(NAMES, len(clips.names)),
        "among": len(clips.names),
        "distance": "Euclidean over all frames, RGB in [0, 1] area-pooled to 32x32, nearest of a clip's windows, on white",
        "change": "mean absolute difference of neighbouring frames, RGB in [0, 1]",
        "steps": STEPS,
        "seeds": "clip i starts from torch seed i",
        "guided": names_score(pipeline, clips, guidance, folder / "contact_sheet.png"),
        "unguided": names_score(pipeline, clips, 1.0),
    }


def lines(result: dict) -> list[str]:
    """What is printed of a score."""
    return [
        f"{row:9} scale {values['guidance_scale']}: top-1 {values['top1']:.1%} top-5 {values['top5']:.1%} of "
        f"{result['names']} names among {result['among']} clips, {values['mean_psnr_db']} dB, "
        f"{values['change_ratio']} times the training clips' change"
        for row, values in ((row, result[row]) for row in ("guided", "unguided"))
    ]
