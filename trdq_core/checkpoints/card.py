"""The README.md beside a saved model: what was done to it, what that cost, and the lines that load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trdq_core.convert import Conversion
from trdq_core.specs import LayerRule, QuantSpec, Recipe, TransformSpec

_TRANSFORMS = {
    "smooth": "smoothing", "greedy_rotation": "a greedy rotation", "serpentine": "a serpentine permutation",
    "hadamard": "a Hadamard rotation", "adaptive_rotation": "a rotation chosen for each input",
}  # fmt: skip
_MEASURES = (
    ("psnr", "PSNR dB", 1), ("ssim", "SSIM", 3), ("final_latent_sqnr_db", "SQNR of the final latents dB", 1),
)  # fmt: skip


def model_card(
    conversion: Conversion,
    *,
    pipeline: str | None,
    denoiser_bytes: int,
    base: str | None = None,
    row: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    picture: str | None = None,
) -> str:
    """The text of the card. `pipeline` is the class to load, None for a denoiser alone; `base` names the model it was.

    `row` is the recipe's row of a report and `calibration` the report's, where a run measured it.
    """
    recipe, facts = conversion.recipe, conversion.facts()
    name = base or type(conversion.denoiser).__name__
    parts = [
        "---\nlibrary_name: diffusers\ntags:\n- quantization\n- tr-dq\n---\n",
        f"# {name}, {recipe.name}\n",
        f"![Sampled with this model]({picture})\n" if picture else "",
        f"Quantized after training by TR-DQ Studio. {_method(recipe)}\n",
        "## Loading it\n",
        _loading(conversion, pipeline),
        "## What was done\n",
        "\n".join(f"- {line}" for line in recipe_words(recipe)) + "\n",
        "## What it weighs\n",
        _weights(facts, denoiser_bytes),
        "## How it was calibrated\n",
        _calibration(conversion, calibration),
        "## How far it is from full precision\n",
        _quality(row),
    ]
    return "\n".join(part for part in parts if part)


def recipe_words(recipe: Recipe) -> list[str]:
    """A recipe as plain lines: a line for each rule, then time groups, sharing, attention products and learnt rounding."""
    lines = [_rule_words(rule) for rule in recipe.rules if rule.weight is not None]
    count = recipe.time.groups_in(1) if recipe.time.kind != "per_step" else None
    if recipe.storage != "shared":
        groups = "one for each calibrated timestep" if count is None else f"{count} groups of timesteps"
        where = "all in memory" if recipe.storage == "resident" else "one in memory, all in the checkpoint's files"
        lines.append(f"Weights for {groups}: {where}.")
    if recipe.attention is not None:
        spec = recipe.attention
        where = " where the CPU kernels run the attention, exact elsewhere" if spec.live else ""
        lines.append(
            f"Attention products with {spec.bits}-bit operands and {spec.softmax_bits}-bit probabilities{where}."
        )
    if recipe.reconstruction is not None:
        lines.append(f"Rounding learnt over each {recipe.reconstruction.unit}.")
    if recipe.sharing is not None and recipe.sharing.active:
        lines.append("The unconditional branch of guidance takes work over from the conditional one, by a stored plan.")
    return lines or ["Nothing is quantized."]


def _method(recipe: Recipe) -> str:
    source = f" Source: {recipe.source}." if recipe.source else ""
    return f"{recipe.description.rstrip('.')}.{source}" if recipe.description else source.strip()


def _rule_words(rule: LayerRule) -> str:
    assert rule.weight is not None  # the caller leaves out rules that quantize nothing
    which = ", ".join(rule.roles) if rule.roles else "all other linears" if rule.match == "*" else ""
    which = ", ".join(filter(None, [which, "" if rule.match == "*" else f"named {rule.match}"]))
    inputs = "inputs in floating point" if rule.activation is None else f"inputs {_grid_words(rule.activation)}"
    words = [f"weights {_grid_words(rule.weight)}", inputs]
    if rule.transforms:
        words.append("behind " + " and ".join(_transform_words(step) for step in rule.transforms))
    if rule.rounding != "nearest":
        words.append({"gptq": "rounded by GPTQ", "adaround": "with learnt rounding"}[rule.rounding])
    if rule.low_rank is not None:
        words.append(f"with a branch of rank {rule.low_rank.rank} in half precision")
    if rule.alternatives:
        words.append(f"the best of {len(rule.chains)} chains of transforms for each input")
    return f"{which}: {', '.join(words)}."


def _grid_words(spec: QuantSpec) -> str:
    grid = {"uniform": "", "twin_log": ", logarithmic levels", "twin_region": ", two regions"}[spec.grid]
    per = f"groups of {spec.group_size}" if spec.granularity == "group" else spec.granularity
    return f"{spec.bits} bits for each {per}{' as it comes' if spec.dynamic else ''}{grid}"


def _transform_words(step: TransformSpec) -> str:
    return _TRANSFORMS[step.kind]


def _loading(conversion: Conversion, pipeline: str | None) -> str:
    kind = type(conversion.denoiser).__name__
    lines = (
        ["import trdq_core  # lets diffusers read it", f"from diffusers import {pipeline}", "",
         f'pipeline = {pipeline}.from_pretrained("this folder")', 'picture = pipeline("a red fox").images[0]']
        if pipeline
        else ["import trdq_core  # lets diffusers read it", f"from diffusers import {kind}", "",
              f'denoiser = {kind}.from_pretrained("this folder")']
    )  # fmt: skip
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _weights(facts: Mapping[str, Any], denoiser_bytes: int) -> str:
    lines = [f"- The denoiser's files: {denoiser_bytes:,} bytes."]
    if facts["kernels"]:
        lines += [
            f"- Its quantized layers: {facts['weight_bytes']:,} bytes in memory, {facts['fp_weight_bytes']:,} in fp32; "
            f"{facts['packed_bits']:.2f} bits for each weight when tightly packed.",
            "- Kernels on the machine that saved it: "
            + ", ".join(f"{name} in {count} layers" for name, count in facts["kernels"].items())
            + ".",
        ]
    if facts["simulated"]:
        lines.append(
            "- Simulated: right numbers, but no integer kernel multiplies all of these grids, so it is not faster."
        )
    return "\n".join(lines) + "\n"


def _calibration(conversion: Conversion, calibration: Mapping[str, Any] | None) -> str:
    if conversion.calibration is None:
        return "It needed no calibration.\n"
    words = f"Fingerprint `{conversion.calibration}`"
    if calibration is not None:
        words += f": {_count(calibration['prompts'], 'prompt')}, {_count(calibration['steps'], 'step')}"
    reach = conversion.time.calibrated
    if reach is not None:
        words += f", timesteps {reach[0]:g} to {reach[1]:g}"
    return words + ".\n"


def _quality(row: Mapping[str, Any] | None) -> str:
    if row is None or (row.get("psnr") is None and not row.get("identical")):
        return "Not measured when it was saved.\n"
    told = [f"- {label}: {row[key]:.{digits}f}" for key, label, digits in _MEASURES if row.get(key) is not None]
    if row.get("identical"):
        told.insert(0, "- The pictures are identical.")
    return (
        "\n".join([f"Means over {_count(row['n'], 'prompt')}, against full precision from the same noise:", "", *told])
        + "\n"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
