"""Quantizing without a calibration: recipes that look at nothing but weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trdq_core.allocator import keep_freed_memory, release_free_memory
from trdq_core.attention_products import use_int8_attention
from trdq_core.convert import Conversion, check_unquantized, install_input, linear_of, without_weights
from trdq_core.errors import RecipeError
from trdq_core.fitting import FittedInput, FittedSet
from trdq_core.kernels import dispatch
from trdq_core.nn.fused_block import fuse
from trdq_core.plan import LayerInfo, check_shapes, group_inputs
from trdq_core.sharing import apply_sharing
from trdq_core.specs import Recipe
from trdq_core.timegroups import TimeArgument, TimeContext, TimeGroups
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.rounding import quantize_weight


@keep_freed_memory()
def convert_without_data(
    denoiser: nn.Module,
    layers: Sequence[LayerInfo],
    recipe: Recipe,
    *,
    backend: dispatch.Backend,
    argument: TimeArgument | str = "timestep",
) -> Conversion:
    """Quantize `denoiser` itself, no copy, with a recipe that takes no calibration; its weights are let go one by one.

    RecipeError names what the recipe would have to be calibrated for. The bits are those that `convert` gives.
    """
    reason = needs_data(recipe)
    if reason is not None:
        raise RecipeError(
            f"{recipe.name}: {reason}, so it has to be calibrated; run python -m trdq_core save --model MODEL --recipe "
            f"{recipe.name} and load the folder it writes, give the calibration, or use a recipe such as rtn-w8a8."
        )
    check_unquantized(denoiser, recipe)
    conversion = Conversion(denoiser, recipe, TimeContext(TimeGroups()), layers=tuple(layers), argument=argument)
    for group in group_inputs(layers, recipe):
        spec, activation = group.rule.weight, group.rule.activation
        assert spec is not None  # groups only hold quantized layers
        check_shapes(group)
        weights = {
            layer.name: quantize_weight(
                linear_of(denoiser, layer.name).weight.detach().double(), spec, layer=layer.name
            )
            for layer in group.layers
        }
        one = FittedSet(InputTransform(), weights, clip=1.0 if activation is None else activation.clip)
        fitted = FittedInput(group, (one,), (), 0.0, 0.0, True)
        install_input(conversion, fitted, denoiser, backend, ())
        conversion.fitted.append(without_weights(fitted))
        del weights, one, fitted  # else the unpacked integers live until the next input is rounded
        release_free_memory()
    conversion.fused = fuse(denoiser)
    if recipe.sharing is not None:
        conversion.sharing = apply_sharing(denoiser, layers, recipe.sharing, conversion.time)
    if recipe.attention is not None:
        conversion.attention = use_int8_attention(denoiser, layers, recipe.attention)
    conversion.time.attach(denoiser, argument)
    return conversion


def needs_data(recipe: Recipe) -> str | None:
    """What a recipe cannot be fitted for without a calibration, None if weights are all it looks at."""
    if recipe.simulated_attention:
        return "its attention products have static grids"
    for rule in recipe.rules:
        activation = rule.activation
        if any(rule.chains):
            return "its transforms are fitted to activations"
        if rule.low_rank is not None or rule.rounding != "nearest" or (rule.weight and rule.weight.range == "output"):
            return "its weights are fitted to activations"
        if activation is not None and not activation.dynamic:
            return "its activation ranges are static"
        if activation is not None and activation.range == "mse":
            return "its clipping of activations is searched"
    return None
