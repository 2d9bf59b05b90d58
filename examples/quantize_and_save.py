"""Quantize a model and write a folder that diffusers loads: python examples/quantize_and_save.py FOLDER [--model NAME]"""

from __future__ import annotations

import argparse

from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from trdq_core import TRDQConfig, save_quantized
from trdq_core.arguments import CALIBRATION_PROMPTS, FALLBACK_PROMPTS
from trdq_core.models import find_folder
from trdq_core.runs import find_calibration, new_run_folder, run
from trdq_core.specs import RunSpec

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="a new folder to write")
parser.add_argument("--model", default="pocket-image")
parser.add_argument("--recipe", default="tr-dq-w4a8")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--calibration-prompts", type=int, default=CALIBRATION_PROMPTS)
given = parser.parse_args()

prompts = FALLBACK_PROMPTS[: given.calibration_prompts]
spec = RunSpec(command="calibrate", model=given.model, calibration_prompts=prompts, steps=given.steps)
if find_calibration(spec) is None:
    run(spec, new_run_folder(spec.command))
calibration = find_calibration(spec)
assert calibration is not None

config = TRDQConfig(given.recipe, calibration.folder)
mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
pipeline = DiffusionPipeline.from_pretrained(find_folder(given.model), quantization_config=mapping)
saved = save_quantized(pipeline, given.folder)
print(f"{saved.folder}: {saved.nbytes / 1e6:.2f} MB, of which the denoiser {saved.denoiser_bytes / 1e6:.2f} MB")
