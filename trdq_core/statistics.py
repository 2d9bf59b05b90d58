"""What a calibration leaves behind: per linear input and timestep the channel ranges and a sample of token rows.

A saved artefact: one calibration serves every recipe, bit-width and grouping. `statistics.safetensors` + `statistics.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trdq_core.errors import CalibrationError, StorageError
from trdq_core.numerics.ranks import spearman
from trdq_core.specs import TimeGroupSpec, TransformSpec
from trdq_core.timegroups import TimeGroups, make_groups

FORMAT_VERSION = 1
FP16_MAX = 65504.0


@dataclass(frozen=True)
class LayerStatistics:
    """One input tensor: `item_absmax` (timesteps, items, channels) and `rows` (timesteps, rows, channels), both fp16.

    An item is one picture or clip of one guidance branch; the rows are a random sample of its tokens.
    """

    item_absmax: Tensor
    rows: Tensor

    def joined(self, other: LayerStatistics) -> LayerStatistics:
        """These statistics and those of further prompts at the same timesteps."""
        return LayerStatistics(
            torch.cat([self.item_absmax, other.item_absmax], 1), torch.cat([self.rows, other.rows], 1)
        )

    def absmax_over_time(self) -> Tensor:
        """The channel absmax at each timestep (timesteps, channels) fp32."""
        return self.item_absmax.float().amax(1)

    def absmax(self, steps: Sequence[int], spec: TransformSpec, weight_absmax: Tensor | None = None) -> Tensor:
        """The channel absmax (channels,) over some timesteps, merged as `spec` says.

        "max" is the largest seen; "ema" the exponential average over calibration items of the absmax, first item first,
        as ViDiT-Q and TR-DQ do it; "spearman" the mean weighted by softmax(-rho), rho being each item's rank correlation
        with the `weight_absmax` (channels,) of the linears: items whose large channels meet small weights have most to
        gain (PTQ4DiT, arXiv 2405.16005). CalibrationError if that is asked for without `weight_absmax`.
        """
        chosen = self.item_absmax[list(steps)].float()
        if spec.absmax == "max":
            return chosen.amax((0, 1))
        if spec.absmax == "spearman":
            return _spearman_mean(chosen.flatten(0, 1), weight_absmax)
        merged = None
        for item in chosen.flatten(0, 1):
            merged = item if merged is None else spec.momentum * merged + (1 - spec.momentum) * item
        return merged if merged is not None else torch.zeros(self.rows.shape[-1])

    def rows_at(self, steps: Sequence[int]) -> Tensor:
        """Sampled rows (rows, channels) fp32 of some timesteps together."""
        return self.rows[list(steps)].flatten(0, 1).float()


@dataclass(frozen=True)
class Statistics:
    """All inputs of one model under one sampling setting."""

    timesteps: tuple[float, ...]  # in the order they were sampled, largest first
    layers: Mapping[str, LayerStatistics]  # by the name of the first linear that reads the input
    about: Mapping[str, Any]  # fingerprint, model, prompts, steps, guidance, seed, seconds

    def groups(self, spec: TimeGroupSpec) -> TimeGroups:
        """The time groups of `spec`, cut where these statistics say so if it leaves that to them."""
        wanted = spec.kind == "dp"
        return make_groups(
            spec, self.timesteps, [layer.absmax_over_time() for layer in self.layers.values()] if wanted else ()
        )

    def steps_of(self, groups: TimeGroups, group: int) -> list[int]:
        """Indices of the timesteps in a group; of the nearest timestep if the group saw none."""
        inside = [i for i, t in enumerate(self.timesteps) if groups.group_of(t) == group]
        if inside:
            return inside
        borders = [0.0, *groups.edges, 1000.0]
        middle = (borders[group] + borders[group + 1]) / 2
        return [min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - middle))]

    def layer(self, name: str) -> LayerStatistics:
        """The statistics of an input; CalibrationError if it was not observed."""
        if name not in self.layers:
            raise CalibrationError(f"{name}: this calibration did not observe the layer; calibrate the model again.")
        return self.layers[name]

    def save(self, folder: Path) -> None:
        """Write the artefact; nothing half-written is left under its final name."""
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.item_absmax"], tensors[f"{name}.rows"] = layer.item_absmax, layer.rows
        about = {
            "format_version": FORMAT_VERSION,
            "timesteps": self.timesteps,
            "layers": list(self.layers),
            **self.about,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "statistics.tmp")
            (folder / "statistics.tmp").replace(folder / "statistics.safetensors")
            (folder / "statistics.json").write_text(json.dumps(about, indent=1))
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                (folder / "statistics.tmp").unlink(missing_ok=True)
            raise StorageError(
                f"calibration: could not write {folder.name} ({error}); free some disk space."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Statistics:
        """Read an artefact; CalibrationError says what is wrong with a damaged or newer one."""
        try:
            about = json.loads((folder / "statistics.json").read_text())
            version, names = about["format_version"], about["layers"]
            if version > FORMAT_VERSION:
                raise CalibrationError(
                    f"calibration {folder.name}: format {version} is newer than {FORMAT_VERSION}, update TR-DQ Studio."
                )
            with safe_open(folder / "statistics.safetensors", "pt") as stored:
                layers = {
                    name: LayerStatistics(stored.get_tensor(f"{name}.item_absmax"), stored.get_tensor(f"{name}.rows"))
                    for name in names
                }
        except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
            raise CalibrationError(
                f"calibration {folder.name}: damaged ({error}); delete it and calibrate again."
            ) from error
        return cls(tuple(about["timesteps"]), layers, about)


def _spearman_mean(items: Tensor, weight_absmax: Tensor | None) -> Tensor:
    """The mean (channels,) of channel absmax (items, channels), those that correlate least with the weights counting most."""
    if weight_absmax is None:
        raise CalibrationError(
            'absmax "spearman": it weighs calibration items by the weights; pass weight_absmax, or use "max" or "ema".'
        )
    rho = spearman(items, weight_absmax.float())
    return (-rho).softmax(0).to(items.dtype) @ items
