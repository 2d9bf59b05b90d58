"""Relative output error of linears for chains of transforms, on inputs of a real sampling run: which chain earns its place.

python -m benchmarks.ablation_transforms --model pocket-image --blocks 0 5 --groups 4

Weights of 4 bits for each output, activations of 4 or 8 bits for each token, both min-max; fitted on every second sampled
row, judged on the others. The error of an input is that of all linears that read it; what is printed is the mean over inputs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from trdq_core.calibration import calibrate
from trdq_core.models import ASSETS, load_model
from trdq_core.numerics.affine import fake_quantize_tokens
from trdq_core.plan import InputGroup, group_inputs
from trdq_core.presets import make_recipe
from trdq_core.sampling import SampledModel
from trdq_core.specs import TimeGroupSpec, TransformSpec
from trdq_core.statistics import Statistics
from trdq_core.transforms.base import InputTransform
from trdq_core.transforms.fit import fit_transform

WEIGHT_BITS = 4
FIT_ROWS, SEARCH_ROWS = 192, 48
SMOOTHINGS: dict[str, tuple[TransformSpec, ...]] = {
    "none": (),
    **{f"{alpha:g}": (TransformSpec(kind="smooth", alpha=alpha),) for alpha in (0.11, 0.3, 0.5)},
    "searched": (TransformSpec(kind="smooth", alpha=None),),
}
_GREEDY, _SERPENTINE = TransformSpec(kind="greedy_rotation"), TransformSpec(kind="serpentine")
_HADAMARD = TransformSpec(kind="hadamard")
ROTATIONS: dict[str, tuple[TransformSpec, ...]] = {
    "none": (),
    "hadamard": (_HADAMARD,),
    "serpentine > hadamard": (_SERPENTINE, _HADAMARD),
    "greedy > serpentine > greedy": (_GREEDY, _SERPENTINE, _GREEDY),
}
Errors = dict[tuple[str, str], float]


def squared_error(transform: InputTransform, rows: Tensor, weights: Sequence[Tensor], *, bits: int) -> float:
    """Squared error of all outputs for `rows` (tokens, channels) under a transform and both roundings."""
    seen = fake_quantize_tokens(transform.apply(rows), bits=bits, symmetric=False)
    total = 0.0
    for weight in weights:
        rounded = fake_quantize_tokens(transform.apply_to_weight(weight), bits=WEIGHT_BITS, symmetric=False)
        total += float((seen @ rounded.float().T - rows @ weight.T).square().sum())
    return total


def ablate(
    statistics: Statistics,
    group: InputGroup,
    weights: Sequence[Tensor],
    *,
    bits: int,
    groups: int,
    chains: Sequence[tuple[str, str]],
) -> Errors:
    """Squared error over squared output of one input for each chain (smoothing, rotation), a transform for each time group."""
    layer = statistics.layer(group.statistics_name)
    time = statistics.groups(TimeGroupSpec(count=groups))
    wrong, total = dict.fromkeys(chains, 0.0), 0.0
    for index in range(groups):
        steps = statistics.steps_of(time, index)
        rows = layer.rows_at(steps)
        fit_rows, held_out = (part[:: max(1, -(-len(part) // FIT_ROWS))] for part in (rows[::2], rows[1::2]))
        total += sum(float((held_out @ weight.T).square().sum()) for weight in weights)
        for smoothing, rotation in chains:
            transform = fit_transform(
                SMOOTHINGS[smoothing] + ROTATIONS[rotation],
                rows=fit_rows,
                absmax=layer.absmax(steps, TransformSpec(kind="smooth")),
                weights=weights,
                seed=0,
                layer=group.statistics_name,
                output_error=partial(
                    squared_error, rows=fit_rows[:: FIT_ROWS // SEARCH_ROWS], weights=weights, bits=bits
                ),
            )
            wrong[smoothing, rotation] += squared_error(transform, held_out, weights, bits=bits)
    return {chain: error / total for chain, error in wrong.items()}


def measure(
    model: SampledModel, statistics: Statistics, *, bits: int, groups: int, blocks: Sequence[int] | None = None
) -> Errors:
    """The mean relative error over the inputs of some blocks, or of all, for every chain."""
    chains = [(smoothing, rotation) for rotation in ROTATIONS for smoothing in SMOOTHINGS]
    found: list[Errors] = []
    for group in group_inputs(model.linears(), make_recipe("rtn")):
        block = re.search(r"\.(\d+)\.", group.statistics_name)
        if blocks is not None and (block is None or int(block[1]) not in blocks):
            continue
        weights = [model.denoiser.get_submodule(layer.name).weight.detach().float() for layer in group.layers]
        found.append(ablate(statistics, group, weights, bits=bits, groups=groups, chains=chains))
    return {chain: sum(errors[chain] for errors in found) / len(found) for chain in chains}


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate on a few prompts and print one table for each number of activation bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-image")
    parser.add_argument("--prompts", type=int, default=4, help="how many of the calibration prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--blocks", type=int, nargs="*", help="block numbers, all if left out")
    parser.add_argument("--groups", type=int, default=1, help="time groups, each with transforms of its own")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4], help="of activations")
    options = parser.parse_args(arguments)
    model = load_model(options.model)
    prompts = json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))["calibration"][: options.prompts]
    statistics = calibrate(model, prompts, steps=options.steps, guidance=3.5, seed=0)
    for bits in options.bits:
        errors = measure(model, statistics, bits=bits, groups=options.groups, blocks=options.blocks)
        print(f"\nW{WEIGHT_BITS}A{bits}, {options.groups} time groups: mean relative output error\n")
        print("| rotation | " + " | ".join(f"smooth {name}" for name in SMOOTHINGS) + " |")
        print("| --- " * (len(SMOOTHINGS) + 1) + "|")
        for rotation in ROTATIONS:
            cells = " | ".join(f"{errors[smoothing, rotation]:.4f}" for smoothing in SMOOTHINGS)
            print(f"| {rotation} | {cells} |")


if __name__ == "__main__":
    main()
