"""The reference pictures or clips of an evaluation: sampled once in full precision, kept in the run folder, loaded batch by
batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trdq_core.errors import StorageError
from trdq_core.sampling import SampledModel, sample_batch
from trdq_core.session import Session
from trdq_core.specs import RunSpec

BATCH = 8  # pictures sampled at once; bounds the memory of activations and of a stored trajectory
SEED_STRIDE = 1000  # from one picture of a prompt to its next
FOLDER = "reference"
REFERENCE = "fp"


class Sample(NamedTuple):
    """One picture or clip: the number of its prompt, and the seed of its first latents."""

    prompt: int
    seed: int


class StoredBatch(NamedTuple):
    """What the reference left for some samples: latents (steps, n, ...) after every step, pictures (n, h, w, 3) or clips
    (n, frames, h, w, 3) uint8."""

    latents: Tensor
    pictures: np.ndarray


def batch_size(model: SampledModel) -> int:
    """How many samples are made at once: clips one by one, since their texts may differ in length, as pictures' do not."""
    return BATCH if model.clip is None else 1


def plan_batches(spec: RunSpec, size: int = BATCH) -> list[list[Sample]]:
    """All samples of a run in batches of at most `size`: every prompt with the first seed, then every prompt with the next.

    Prompt i starts from seed + i, as in a comparison, and its further pictures from 1000 more each.
    """
    samples = [
        Sample(prompt, spec.seed + prompt + SEED_STRIDE * repeat)
        for repeat in range(spec.seeds)
        for prompt in range(len(spec.prompts))
    ]
    return [samples[i : i + size] for i in range(0, len(samples), size)]


@dataclass(frozen=True)
class References:
    """The stored batches of one run. `digest` is of everything the reference depends on."""

    folder: Path
    batches: Sequence[Sequence[Sample]]
    digest: str

    @property
    def samples(self) -> list[Sample]:
        """All samples in the order they are measured in."""
        return [sample for batch in self.batches for sample in batch]

    def __iter__(self) -> Iterator[tuple[Sequence[Sample], StoredBatch]]:
        for index, batch in enumerate(self.batches):
            yield batch, self.load(index)

    def has(self, index: int) -> bool:
        """Whether a batch is there, whole, and of this very reference."""
        try:
            with safe_open(self._file(index), "pt") as stored:
                return (stored.metadata() or {}).get("digest") == self.digest
        except (OSError, SafetensorError):
            return False

    def load(self, index: int) -> StoredBatch:
        """One batch; StorageError if its file went away while the run was going on."""
        try:
            with safe_open(self._file(index), "pt") as stored:
                return StoredBatch(stored.get_tensor("latents"), stored.get_tensor("pictures").numpy())
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"reference {self._file(index).name}: cannot be read ({error}); start the evaluation again."
            ) from error

    def store(self, index: int, latents: Tensor, pictures: np.ndarray) -> None:
        """Keep one batch: latents (steps, n, ...) in the model's dtype, pictures (n, h, w, 3) uint8."""
        file, partial = self._file(index), self._file(index).with_suffix(".tmp")
        tensors = {"latents": latents.contiguous().cpu(), "pictures": torch.from_numpy(pictures)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"digest": self.digest})
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"reference {file.name}: could not be written ({error}); free some disk space."
            ) from error

    def _file(self, index: int) -> Path:
        return self.folder / f"batch_{index:03d}.safetensors"


def make_references(session: Session, label: str) -> References:
    """The references of a run: those of an earlier start are kept, the others sampled now. Takes encoded prompts."""
    spec, model = session.spec, session.model
    batches = plan_batches(spec, batch_size(model))
    references = References(session.folder.path / FOLDER, batches, reference_digest(model, spec))
    missing = [index for index in range(len(references.batches)) if not references.has(index)]
    session.stage("reference", f"Sampling {label}: {len(references.samples)} {_what(model)}s", REFERENCE)
    progress = session.progress("reference", len(references.batches) * spec.steps, REFERENCE)
    progress.skip((len(references.batches) - len(missing)) * spec.steps)
    for index in missing:
        batch = references.batches[index]
        latents: list[Tensor] = []

        def keep(step: int, timestep: float, value: Tensor, kept: list[Tensor] = latents, i: int = index) -> None:
            kept.append(value.clone())
            progress.advance(f"{_what(model)} {i * batch_size(model) + 1} and on")

        final = sample_references(session, batch, keep)
        references.store(index, torch.stack(latents), decode_all(model, final))
    return references


def _what(model: SampledModel) -> str:
    return "picture" if model.clip is None else "clip"


def sample_references(session: Session, batch: Sequence[Sample], on_step: Any) -> Tensor:
    """The final latents (n, ...) of a batch with whatever denoiser the model uses at present."""
    spec = session.spec
    return sample_batch(
        session.model,
        [session.conditionings[sample.prompt] for sample in batch],
        [sample.seed for sample in batch],
        steps=spec.steps,
        guidance=spec.guidance,
        on_step=on_step,
    )


def decode_all(model: SampledModel, latents: Tensor) -> np.ndarray:
    """Pictures (n, height, width, 3) or clips (n, frames, height, width, 3) uint8 of latents (n, ...), one after the other
    to bound memory."""
    return np.ascontiguousarray([model.decode(latents[i : i + 1]) for i in range(len(latents))])


def reference_digest(model: SampledModel, spec: RunSpec) -> str:
    """A digest of everything the reference pictures depend on; recipes do not belong to it."""
    what = [batch_size(model), model.fingerprint(), str(model.dtype), list(spec.prompts), spec.steps, spec.guidance]
    return hashlib.sha256(json.dumps([*what, spec.seed, spec.seeds]).encode()).hexdigest()[:16]
