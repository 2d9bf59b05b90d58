"""Let the unconditional branch borrow attention where both attend alike: python examples/sharing.py [--model NAME]"""

from __future__ import annotations

import argparse

from trdq_core.presets import make_recipe, with_sharing
from trdq_core.runs import new_run_folder, run
from trdq_core.specs import RunSpec, SharingSpec

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pocket-image")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--threshold", type=float, default=0.1, help="largest relative output error of a block that shares")
given = parser.parse_args()

settings = {"model": given.model, "steps": given.steps, "prompts": ("red apple",)}
wish = SharingSpec(threshold=given.threshold, measure="output_error")
measured = run(RunSpec(command="attention", sharing=wish, **settings), new_run_folder("attention"))
plan = SharingSpec.from_dict(measured["similarity"]["plan"])
print(
    f"the plan shares {sum(map(len, plan.blocks))} blocks and saves {plan.predicted_saving:.1%} of attention's operations"
)

shared = with_sharing(make_recipe("fp"), plan)
row = run(RunSpec(command="compare", recipes=(shared,), **settings), new_run_folder("compare"))["recipes"]
if plan.active:
    print(f"with it the pictures keep {row[shared.name]['psnr'] or float('inf'):.1f} dB")
