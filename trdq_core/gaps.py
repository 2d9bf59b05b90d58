"""What the attention command measured: how far the guidance branches, and neighbouring steps, are apart. On disk and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trdq_core.errors import CalibrationError, StorageError

FORMAT_VERSION = 2  # 2: differences between neighbouring steps, operations of the denoiser
FILES = ("similarity.safetensors", "similarity.json")
TEMPORAL = "temporal"  # the folder beside them with the same two files of the temporal attentions
TENSORS = ("map_cosine", "output_error", "block_error", "step_error", "guidance_change", "guidance_share")


@dataclass(frozen=True)
class Similarity:
    """The measures over timesteps, blocks and heads: means over prompts, fp32.

    Those that compare steps are None in files of format 1, which did not have them.
    """

    timesteps: tuple[float, ...]  # as sampled, largest first
    map_cosine: Tensor  # (timesteps, blocks, heads)
    output_error: Tensor  # (timesteps, blocks, heads)
    block_error: Tensor  # (timesteps, blocks), the output error of all heads together
    about: Mapping[str, Any]  # model, prompts, steps, guidance, seed, tokens, channels, blocks, denoiser_flops
    step_error: Tensor | None = None  # (timesteps, blocks) of an output taken from the step before; NaN in the first
    guidance_change: Tensor | None = None  # (timesteps,) ||d_t - d_before|| / ||d_t||, d = conditional - unconditional
    guidance_share: Tensor | None = None  # (timesteps,) ||d_t|| / ||conditional_t||
    temporal: Similarity | None = None  # the same run's blocks that attend across the frames of a clip, where there are

    def save(self, folder: Path) -> None:
        """Write similarity.safetensors and similarity.json, and those of the temporal blocks into a folder beside them."""
        if self.temporal is not None:
            self.temporal.save(folder / TEMPORAL)
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {**self.about, "format_version": FORMAT_VERSION, "timesteps": self.timesteps}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "similarity.tmp")
            (folder / "similarity.tmp").replace(folder / FILES[0])
            (folder / FILES[1]).write_text(json.dumps(about, indent=1))
        except (OSError, SafetensorError) as error:
            raise StorageError(f"similarity: could not write {folder.name} ({error}); free some disk space.") from error

    @classmethod
    def load(cls, folder: Path) -> Similarity:
        """Read what `save` wrote; CalibrationError if a file is missing, damaged or newer.

        Clips measured by older versions have no temporal blocks.
        """
        try:
            about = json.loads((folder / FILES[1]).read_text())
            if about["format_version"] > FORMAT_VERSION:
                raise CalibrationError(
                    f"similarity {folder.name}: format {about['format_version']} is newer than {FORMAT_VERSION}, "
                    "update TR-DQ Studio."
                )
            temporal = cls.load(folder / TEMPORAL) if (folder / TEMPORAL).is_dir() else None
            return cls(tuple(about["timesteps"]), **load_file(folder / FILES[0]), about=about, temporal=temporal)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(f"similarity {folder.name}: damaged ({error}); measure it again.") from error
