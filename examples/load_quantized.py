"""Load a quantized folder with diffusers alone and draw with it: python examples/load_quantized.py FOLDER"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

import trdq_core  # noqa: F401  diffusers knows the format once this is imported

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="a folder that quantize_and_save.py wrote")
parser.add_argument("--prompt", default="red apple")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="picture.png")
given = parser.parse_args()

pipeline = DiffusionPipeline.from_pretrained(given.folder)
pipeline.set_progress_bar_config(disable=True)
# The last two are what the pocket model wants: it is smaller than the resolutions the stock pipeline rounds to.
pictures = pipeline(
    given.prompt,
    num_inference_steps=given.steps,
    guidance_scale=3.5,
    generator=torch.Generator().manual_seed(0),
    use_resolution_binning=False,
    clean_caption=False,
).images
pictures[0].save(given.out)
print(f"{given.out}: {given.prompt}, {pictures[0].width} x {pictures[0].height}")
