"""The part of the fake core that saves a model: a small folder, and what a save run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_model(folder: Path, size: int = 4096) -> dict[str, Any]:
    """A folder that looks like diffusers' in `folder`/model, and the `saved` part of the report."""
    model = folder / "model"
    (model / "transformer").mkdir(parents=True)
    (model / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(size))
    return {
        "folder": str(model), "bytes": 3 << 20, "denoiser_bytes": 1 << 20, "fp_denoiser_bytes": 4 << 20, "bit_equal": True,
        "seconds": 0.1,
    }  # fmt: skip
