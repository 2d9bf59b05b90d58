"""From statistics and a recipe to a quantized denoiser."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trdq_core.errors import CalibrationError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.fitting import FittedInput, fit_input
from trdq_core.kernels import dispatch
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear, pack
from trdq_core.nn.modules import module_bytes, replace_module, share_copy
from trdq_core.nn.switched import SwitchedSets, set_buffers, write_sets
from trdq_core.plan import LayerInfo, group_inputs
from trdq_core.sharing import Sharing, apply_sharing, shared_copy
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeContext, TimeGroups, make_groups
from trdq_core.transforms.base import InputTransform

Ranges = Mapping[str, Sequence[tuple[float, float]]]  # by the linear that owns the input: low, high of each set
SecondPass = Callable[[Mapping[str, Sequence[InputTransform]], TimeGroups], Ranges]


@dataclass
class Conversion:
    """A quantized copy of a denoiser and what is known of it. The parts left in full precision are shared with the original."""

    denoiser: nn.Module
    recipe: Recipe
    time: TimeContext
    fitted: list[FittedInput] = field(default_factory=list)
    switched: SwitchedSets | None = None
    sharing: Sharing | None = None

    def quantized_layers(self) -> dict[str, QuantizedLinear]:
        """The quantized linears by name."""
        return {name: m for name, m in self.denoiser.named_modules() if isinstance(m, QuantizedLinear)}

    def facts(self) -> dict[str, Any]:
        """Measured bytes, kernels and rejected transforms, for reports. Bytes count every buffer of the quantized layers."""
        layers = self.quantized_layers()
        biases = sum(layer.bias.nbytes for layer in layers.values() if layer.bias is not None)
        weight_bytes = module_bytes(*layers.values()) - biases
        fp_bytes = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
        kernels: dict[str, int] = {}
        for layer in layers.values():
            kernels[layer.kernel] = kernels.get(layer.kernel, 0) + 1
        return {
            "weight_bytes": weight_bytes,
            "fp_weight_bytes": fp_bytes,
            "resident_bytes": module_bytes(self.denoiser),
            "disk_bytes": self.switched.nbytes if self.switched else 0,
            "effective_bits": 32 * weight_bytes / fp_bytes if fp_bytes else 32.0,
            "kernels": kernels,
            "simulated": any(layer.simulated for layer in layers.values()),
            "sets": max((len(f.transforms) for f in self.fitted), default=1),
            "rejected": [
                {
                    "layer": fitted.group.layers[0].name,
                    "error_with": fitted.error_with,
                    "error_without": fitted.error_without,
                }
                for fitted in self.fitted
                if not fitted.kept
            ],
            **({"sharing": self.sharing.facts()} if self.sharing is not None else {}),
        }


def convert(
    denoiser: nn.Module,
    layers: Sequence[LayerInfo],
    recipe: Recipe,
    statistics: Statistics,
    *,
    backend: dispatch.Backend,
    storage_folder: Path,
    argument: str = "timestep",
    seed: int = 0,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
    second_pass: SecondPass | None = None,
) -> Conversion:
    """A quantized copy of `denoiser`; the original is untouched. Time groups follow its `argument` from then on.

    `second_pass` observes the inputs again through the fitted transforms; recipes with static activation grids need it.
    """
    groups = make_groups(recipe.time, statistics.timesteps)
    calibrated = (min(statistics.timesteps), max(statistics.timesteps))
    time = TimeContext(groups if recipe.storage != "shared" else TimeGroups(), calibrated)
    copy = share_copy(denoiser)
    conversion = Conversion(copy, recipe, time)
    steps_of_sets = set_steps(recipe, statistics)
    inputs = group_inputs(layers, recipe)
    progress = Progress("fit", len(inputs), on_event=on_event, cancelled=cancelled, recipe=recipe.name)
    fits: list[FittedInput] = []
    for index, group in enumerate(inputs):
        weights = {layer.name: _linear(denoiser, layer.name).weight.detach() for layer in group.layers}
        fitted = fit_input(
            group,
            weights,
            statistics.layer(group.statistics_name),
            steps_of_sets,
            do_no_harm=recipe.do_no_harm,
            seed=seed + index,
        )
        fits.append(fitted)
        progress.advance(group.layers[0].name)
    ranges = _static_ranges(fits, time.groups, second_pass)
    while fits:  # emptied as it goes, so that packed and unpacked integers are not held together
        fitted = fits.pop(0)
        _install(conversion, fitted, denoiser, backend, ranges.get(fitted.group.layers[0].name))
        conversion.fitted.append(_without_weights(fitted))
    if recipe.storage == "switched" and len(steps_of_sets) > 1:
        _switch(conversion, storage_folder, statistics)
    if recipe.sharing is not None:
        conversion.sharing = apply_sharing(copy, layers, recipe.sharing, time)
    time.attach(copy, argument)
    return conversion


def convert_sharing_only(
    denoiser: nn.Module, layers: Sequence[LayerInfo], recipe: Recipe, *, argument: str = "timestep"
) -> Conversion:
    """A full-precision copy that only shares attention: nothing is fitted, so it takes no statistics."""
    assert recipe.sharing is not None and not recipe.quantized  # the caller asked for nothing else
    copy, time, sharing = shared_copy(denoiser, layers, recipe.sharing, argument=argument)
    return Conversion(copy, recipe, time, sharing=sharing)


def _static_ranges(fits: Sequence[FittedInput], groups: TimeGroups, second_pass: SecondPass | None) -> Ranges:
    """The second pass over the inputs whose activations get a static grid; nothing if there are none."""
    wanted = {
        fitted.group.layers[0].name: fitted.transforms
        for fitted in fits
        if fitted.group.rule.activation is not None and not fitted.group.rule.activation.dynamic
    }
    if not wanted:
        return {}
    if second_pass is None:
        raise CalibrationError(
            f"{next(iter(wanted))}: static activation ranges need a second calibration pass; pass second_pass=..."
        )
    return second_pass(wanted, groups)


def set_steps(recipe: Recipe, statistics: Statistics) -> list[list[int]]:
    """The timestep indices each set is fitted on: all of them for shared storage, else those of each time group."""
    if recipe.storage == "shared":
        return [list(range(len(statistics.timesteps)))]
    groups = make_groups(recipe.time, statistics.timesteps)
    return [statistics.steps_of(groups, group) for group in range(groups.count)]


def _linear(denoiser: nn.Module, name: str) -> nn.Linear:
    module = denoiser.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise CalibrationError(
            f"{name}: expected a linear layer, found {type(module).__name__}; load the model afresh."
        )
    return module


def _without_weights(fitted: FittedInput) -> FittedInput:
    # The integers now live in the layers; keeping them here too would double the memory of the quantized model.
    return fitted._replace(weights={})


def _install(
    conversion: Conversion,
    fitted: FittedInput,
    denoiser: nn.Module,
    backend: dispatch.Backend,
    ranges: Sequence[tuple[float, float]] | None,
) -> None:
    """Replace the linears of one input by quantized ones."""
    activation = fitted.group.rule.activation
    weight_spec = fitted.group.rule.weight
    assert activation is not None and weight_spec is not None  # groups only hold quantized layers
    quantizer = InputQuantizer(
        fitted.transforms,
        bits=activation.bits,
        symmetric=activation.symmetric,
        time=conversion.time,
        backend=backend,
        readers=len(fitted.group.layers),
        ranges=ranges,
    )
    for index, (name, sets) in enumerate(fitted.weights.items()):
        layer = QuantizedLinear(
            [pack(weight) for weight in sets],
            _linear(denoiser, name).bias,
            quantizer,
            owns_input=index == 0,
            weight_bits=weight_spec.bits,
        )
        replace_module(conversion.denoiser, name, layer)


def _switch(conversion: Conversion, folder: Path, statistics: Statistics) -> None:
    """Move all sets into a file and leave only the first in memory."""
    modules = {n: m for n, m in conversion.denoiser.named_modules() if isinstance(m, (QuantizedLinear, InputQuantizer))}
    count = len(set_steps(conversion.recipe, statistics))
    sets = [{n: {k: b[i : i + 1] for k, b in set_buffers(m).items()} for n, m in modules.items()} for i in range(count)]
    digest = hashlib.sha256(
        (conversion.recipe.to_json() + str(statistics.about.get("fingerprint"))).encode()
    ).hexdigest()
    file = folder / f"{conversion.recipe.name}-{digest[:12]}.safetensors"
    write_sets(file, sets)
    for module in modules.values():
        for name, buffer in set_buffers(module).items():
            module._buffers[name] = buffer[:1].clone()
        module.sets = 1
        module.refresh()
    conversion.switched = SwitchedSets(file, modules)
    conversion.time.on_change(conversion.switched.activate)
    conversion.switched.activate(conversion.time.group)
