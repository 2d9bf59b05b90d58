"""Similarities and sharing plans without torch, with the rules that `docs/interfaces.md` gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trdq_core.errors import CalibrationError
from trdq_core.specs import RunSpec, SharingSpec

BLOCKS, HEADS, TEMPORAL_BLOCKS = 8, 4, 6


class FakeTimeGroups(NamedTuple):
    edges: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        return len(self.edges) + 1

    def group_of(self, timestep: float) -> int:
        return sum(timestep >= edge for edge in self.edges)


class FakeSimilarity(NamedTuple):
    timesteps: tuple[float, ...]
    map_cosine: Any
    output_error: Any
    block_error: Any
    about: dict[str, Any]
    temporal: FakeSimilarity | None = None

    @classmethod
    def load(cls, folder: Path) -> FakeSimilarity:
        try:
            about = json.loads((folder / "similarity.json").read_text())
            numbers = load_file(folder / "similarity.safetensors")
            temporal = cls.load(folder / "temporal") if (folder / "temporal").is_dir() else None
            return cls(tuple(about["timesteps"]), **numbers, about=about, temporal=temporal)
        except (OSError, ValueError, SafetensorError) as error:
            raise CalibrationError(f"similarity {folder.name}: damaged ({error}); measure it again.") from error


def made_up_similarity(steps: int, blocks: int, heads: int) -> dict[str, Any]:
    """Errors that grow with the block and the timestep; (steps, blocks, heads), the first step at the largest timestep."""
    time, depth, head = np.meshgrid(
        np.linspace(1, 0.1, steps), np.arange(blocks) / blocks, 0.8 + 0.4 * np.arange(heads) / heads, indexing="ij"
    )
    error = (0.4 * time * depth * head).astype(np.float32)
    return {"map_cosine": 1 - error / 5, "output_error": error, "block_error": error.mean(-1)}


class FakeSharing:
    """`trdq_core.similarity` over stored numbers, with the rules that `docs/interfaces.md` gives."""

    Similarity = FakeSimilarity

    def plan_sharing(
        self, similarity: FakeSimilarity, groups: Any, *, threshold: float, measure: str = "output_error"
    ) -> SharingSpec:
        of = np.array([groups.group_of(timestep) for timestep in similarity.timesteps])
        error = measure == "output_error"
        score, limit = (
            (similarity.block_error, threshold) if error else (1 - similarity.map_cosine.mean(-1), 1 - threshold)
        )
        blocks = tuple(
            tuple(b for b in range(score.shape[1]) if (of == g).any() and score[of == g, b].max() <= limit)
            for g in range(groups.count)
        )
        spec = SharingSpec(blocks=blocks, edges=groups.edges, measure=measure, threshold=threshold)
        return self.predict(similarity, spec)

    def predict(self, similarity: FakeSimilarity, spec: SharingSpec) -> SharingSpec:
        groups = FakeTimeGroups(spec.edges)
        errors = [
            float(similarity.block_error[step, block])
            for step, timestep in enumerate(similarity.timesteps)
            for block in spec.blocks[groups.group_of(timestep)]
        ]
        return dataclasses.replace(
            spec,
            predicted_error=float(np.mean(errors)) if errors else 0.0,
            worst_error=max(errors, default=0.0),
            predicted_saving=0.25 * len(errors) / similarity.block_error.size,
        )


def uniform_groups(spec: Any) -> FakeTimeGroups:
    return FakeTimeGroups(tuple(1000 * index / spec.count for index in range(1, spec.count)))


def write_similarity(folder: Path, spec: RunSpec) -> dict[str, Any]:
    """The two files of a measurement, of a clip also those of its temporal blocks, and the numbers in them."""
    made, moving = made_up_similarity(spec.steps, BLOCKS, HEADS), spec.model == "pocket-video"
    about = {
        "format_version": 1, "timesteps": np.linspace(999, 50, spec.steps).round().tolist(), "model": spec.model,
        "prompts": list(spec.prompts), "steps": spec.steps, "guidance": spec.guidance, "seed": spec.seed,
        "channels": 256, "created": "2026-11-21T05:00:00", "seconds": 3.0,
    }  # fmt: skip
    if moving:
        temporal = made_up_similarity(spec.steps, TEMPORAL_BLOCKS, HEADS)
        temporal |= {"block_error": 2 * temporal["block_error"], "output_error": 2 * temporal["output_error"]}
        names = [f"temporal_transformer_blocks.{block}.attn1" for block in range(TEMPORAL_BLOCKS)]
        _write(folder / "temporal", temporal, about | {"tokens": 16, "patches": 64, "blocks": names})
        made["temporal"] = temporal
    names = [f"transformer_blocks.{block}.attn1" for block in range(BLOCKS)]
    spatial = {name: part for name, part in made.items() if name != "temporal"}
    _write(folder, spatial, about | {"tokens": 64, "frames": 16 if moving else 1, "blocks": names})
    return made


def similarity_means(made: dict[str, Any]) -> dict[str, Any]:
    """What the report says of a measurement."""
    return {
        "map_cosine": float(made["map_cosine"].mean()), "output_error": float(made["block_error"].mean()),
        "block_error": made["block_error"].mean(0).tolist(),
    }  # fmt: skip


def _write(folder: Path, numbers: dict[str, Any], about: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(part) for name, part in numbers.items()}, folder / "similarity.safetensors")
    (folder / "similarity.json").write_text(json.dumps(about))
