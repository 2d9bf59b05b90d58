"""Compare two recipes with full precision on one prompt: python examples/compare.py [--model NAME] [--steps N]"""

from __future__ import annotations

import argparse

from trdq_core.arguments import CALIBRATION_PROMPTS, FALLBACK_PROMPTS
from trdq_core.presets import parse_recipe
from trdq_core.runs import new_run_folder, run
from trdq_core.specs import RunSpec

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pocket-image")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--calibration-prompts", type=int, default=CALIBRATION_PROMPTS)
given = parser.parse_args()

spec = RunSpec(
    command="compare",
    model=given.model,
    recipes=(parse_recipe("rtn-w4a8"), parse_recipe("tr-dq-w4a8", groups=2)),
    prompts=("red apple",),
    calibration_prompts=FALLBACK_PROMPTS[: given.calibration_prompts],
    steps=given.steps,
)
folder = new_run_folder(spec.command)
report = run(spec, folder)
for name, row in report["recipes"].items():
    if row["kind"] == "quantized":
        print(f"{name}: PSNR {row['psnr']:.1f} dB, {row['weight_bytes'] / row['fp_weight_bytes']:.3f} of the bytes")
print(f"pictures and report: {folder}")
