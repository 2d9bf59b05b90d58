"""From statistics and a recipe to a quantized denoiser."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from trdq_core.allocator import keep_freed_memory, release_free_memory
from trdq_core.attention_products import LiveProducts, QuantizedProducts, use_int8_attention
from trdq_core.errors import CalibrationError, ModelError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.fitting import FittedInput, fit_input
from trdq_core.kernels import dispatch
from trdq_core.nn.fused_block import fuse
from trdq_core.nn.input_grid import Range
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.modules import module_bytes, replace_module, share_copy
from trdq_core.nn.switched import SwitchedSets, keep_first_set, set_buffers, write_sets
from trdq_core.passes import NO_PASSES, ModelPasses, RangeRequest, Ranges
from trdq_core.plan import InputGroup, LayerInfo, group_inputs
from trdq_core.scale_search import OutputSamples
from trdq_core.sharing import Sharing, apply_sharing, shared_copy
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics
from trdq_core.timegroups import TimeArgument, TimeContext, TimeGroups

OBSERVED_RANGES = ("minmax", "ema")  # of static inputs: what spans every value, or follows the items

_ON_CONVERSION: list[Callable[[Conversion], None]] = []


def on_conversion(act: Callable[[Conversion], None]) -> None:
    """Have `act` called with every conversion as soon as it is made: so adapters let libraries of theirs know of it."""
    if act not in _ON_CONVERSION:
        _ON_CONVERSION.append(act)


@dataclass
class Conversion:
    """A quantized copy of a denoiser and what is known of it. The parts left in full precision are shared with the original."""

    denoiser: nn.Module
    recipe: Recipe
    time: TimeContext
    fitted: list[FittedInput] = field(default_factory=list)
    switched: SwitchedSets | None = None
    sharing: Sharing | None = None
    packed_bytes: int = 0  # of a file with tightly packed codes; all sets
    attention: QuantizedProducts | LiveProducts | None = None
    reconstruction: dict[str, Any] | None = None
    fused: dict[str, int] = field(default_factory=dict)  # how many attentions, feed-forwards and blocks run fused
    layers: tuple[LayerInfo, ...] = ()  # of the whole denoiser, with their roles
    argument: TimeArgument | str = "timestep"  # of the denoiser's forward, that time groups follow
    calibration: str | None = None  # fingerprint of the statistics it was fitted to
    count_file: Callable[[Conversion], int] | None = (
        None  # bytes of the file that saving it writes, where it can be saved
    )

    def __post_init__(self) -> None:
        self.denoiser.trdq_conversion = self  # what saving a model finds again
        for act in _ON_CONVERSION:
            act(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        return self  # copies of a denoiser share its weights, and files that are mapped cannot be copied

    def quantized_layers(self) -> dict[str, QuantizedLinear]:
        """The quantized linears by name."""
        return {name: m for name, m in self.denoiser.named_modules() if isinstance(m, QuantizedLinear)}

    def facts(self) -> dict[str, Any]:
        """Measured bytes, kernels and rejected transforms, for reports. Bytes count every buffer of the quantized layers.

        `file_bytes` are those of the whole denoiser in the file that saving it writes; of one that cannot be saved, those of
        its tensors with every code packed tightly. `packed_bits` are those of the quantized layers so packed, scales and
        transforms included; `effective_bits` those that this machine holds. Both per weight of the quantized layers.
        `transformed_layers` are those that scale, permute or rotate their input.
        """
        layers = self.quantized_layers()
        biases = sum(layer.bias.nbytes for layer in layers.values() if layer.bias is not None)
        weight_bytes = module_bytes(*layers.values()) - biases
        count = sum(layer.in_features * layer.out_features for layer in layers.values())
        kernels: dict[str, int] = {}
        for layer in layers.values():
            kernels[layer.kernel] = kernels.get(layer.kernel, 0) + 1
        packed_file = module_bytes(self.denoiser) - weight_bytes + self.packed_bytes
        kernels |= self.attention.kernels if self.attention is not None else {}
        simulated = any(layer.simulated for layer in layers.values()) or self.recipe.simulated_attention
        return {
            "weight_bytes": weight_bytes,
            "fp_weight_bytes": 4 * count,
            "resident_bytes": module_bytes(self.denoiser) + sum(layer.dense_bytes for layer in layers.values()),
            "disk_bytes": self.switched.nbytes if self.switched else 0,
            "file_bytes": self.count_file(self) if self.count_file is not None else packed_file,
            "effective_bits": 8 * weight_bytes / count if count else 32.0,
            "packed_bits": 8 * self.packed_bytes / count if count else 32.0,
            "kernels": kernels,
            "quantized_layers": len(layers),
            "transformed_layers": sum(not layer.input_quantizer.stages().empty for layer in layers.values()),
            "fused": self.fused,
            "simulated": simulated,
            "sets": max((len(f.distinct) for f in self.fitted), default=1),
            "rejected": [
                {
                    "layer": fitted.group.layers[0].name,
                    "error_with": fitted.error_with,
                    "error_without": fitted.error_without,
                }
                for fitted in self.fitted
                if not fitted.kept
            ],
            "chains": _chains(self.fitted),
            **({"sharing": self.sharing.facts()} if self.sharing is not None else {}),
            **({"attention": self.attention.facts()} if self.attention is not None else {}),
            **({"reconstruction": self.reconstruction} if self.reconstruction is not None else {}),
        }


def _chains(fits: Sequence[FittedInput]) -> dict[str, int]:
    """How many inputs ended with which transforms."""
    counted: dict[str, int] = {}
    for fitted in fits:
        words = fitted.sets[0].transform.describe()
        counted[words] = counted.get(words, 0) + 1
    return counted


@keep_freed_memory()
def convert(
    denoiser: nn.Module,
    layers: Sequence[LayerInfo],
    recipe: Recipe,
    statistics: Statistics,
    *,
    backend: dispatch.Backend,
    storage_folder: Path,
    argument: TimeArgument | str = "timestep",
    seed: int = 0,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
    passes: ModelPasses = NO_PASSES,
    in_place: bool = False,
) -> Conversion:
    """A quantized copy of `denoiser`, itself untouched unless `in_place`; time groups follow its `argument` from then on.

    The copy shares what stays in full precision, and each input is quantized as soon as it is fitted where nothing has to
    look at all fits together. In place the full-precision weights go one by one; what fails midway leaves it half converted.
    `passes` sample the whole model again for what statistics cannot give: static ranges, curvature, reconstruction,
    attention products. CalibrationError names the one that a recipe needs and does not find.
    """
    check_unquantized(denoiser, recipe)
    groups = groups_of(recipe, statistics)
    time = TimeContext(groups, (min(statistics.timesteps), max(statistics.timesteps)))
    copy = denoiser if in_place else share_copy(denoiser)
    conversion = Conversion(
        copy, recipe, time, layers=tuple(layers), argument=argument, calibration=statistics.about.get("fingerprint")
    )
    inputs = group_inputs(layers, recipe)
    curvature = _curvature(inputs, passes)
    progress = Progress("fit", len(inputs), on_event=on_event, cancelled=cancelled, recipe=recipe.name)
    fits = _fit_inputs(denoiser, inputs, recipe, statistics, curvature, progress, seed)
    if recipe.reconstruction is not None or any(_observed(group) for group in inputs):
        held = list(fits)
        ranges = static_ranges(held, groups, statistics, passes)
        if recipe.reconstruction is not None:
            held, conversion.reconstruction = passes.reconstructed(held, ranges, recipe)
        while held:  # emptied as it goes, so that packed and unpacked integers are not held together
            _install(conversion, held.pop(0), ranges, denoiser, backend)
    else:
        for fitted in fits:
            _install(conversion, fitted, static_ranges([fitted], groups, statistics, passes), denoiser, backend)
    if recipe.storage == "switched" and len(set_steps(recipe, statistics)) > 1:
        _switch(conversion, storage_folder, statistics)
    conversion.fused = fuse(copy)
    if recipe.sharing is not None:
        conversion.sharing = apply_sharing(copy, layers, recipe.sharing, time)
    if recipe.attention is not None:
        conversion.attention = (
            use_int8_attention(copy, layers, recipe.attention)
            if recipe.attention.live
            else passes.quantized_attention(copy, recipe.attention, groups, time)
        )
    time.attach(copy, argument)
    return conversion


def _fit_inputs(
    denoiser: nn.Module,
    inputs: Sequence[InputGroup],
    recipe: Recipe,
    statistics: Statistics,
    curvature: dict[str, OutputSamples],
    progress: Progress,
    seed: int,
) -> Iterator[FittedInput]:
    """Every quantized input of a denoiser in model order, each fitted when it is asked for."""
    steps_of_sets = set_steps(recipe, statistics)
    for index, group in enumerate(inputs):
        yield fit_input(
            group,
            # Not kept here: in place these are the last references, and the weights go when the input is replaced.
            {layer.name: linear_of(denoiser, layer.name).weight.detach() for layer in group.layers},
            statistics.layer(group.statistics_name),
            steps_of_sets,
            do_no_harm=recipe.do_no_harm,
            seed=seed + index,
            curvature=curvature,
        )
        release_free_memory()
        progress.advance(group.layers[0].name)


def _install(
    conversion: Conversion,
    fitted: FittedInput,
    ranges: Ranges,
    denoiser: nn.Module,
    backend: dispatch.Backend,
) -> None:
    """Put one input into the conversion, which keeps what is known of it."""
    install_input(conversion, fitted, denoiser, backend, ranges.get(fitted.group.layers[0].name, ()))
    conversion.fitted.append(without_weights(fitted))


def _observed(group: InputGroup) -> bool:
    """Whether a second pass over the model has to see the range of this input, and for that every transform."""
    spec = group.rule.activation
    return spec is not None and not spec.dynamic and spec.range in OBSERVED_RANGES


def convert_sharing_only(
    denoiser: nn.Module, layers: Sequence[LayerInfo], recipe: Recipe, *, argument: TimeArgument | str = "timestep"
) -> Conversion:
    """A full-precision copy that only shares attention: nothing is fitted, so it takes no statistics."""
    assert recipe.sharing is not None and not recipe.quantized  # the caller asked for nothing else
    copy, time, sharing = shared_copy(denoiser, layers, recipe.sharing, argument=argument)
    return Conversion(copy, recipe, time, sharing=sharing, layers=tuple(layers), argument=argument)


def check_unquantized(denoiser: nn.Module, recipe: Recipe) -> None:
    """ModelError if `denoiser` is what a conversion made, such as a saved model that was loaded."""
    found = getattr(denoiser, "trdq_conversion", None)
    if isinstance(found, Conversion):
        raise ModelError(
            f"{recipe.name}: this model is quantized already, with {found.recipe.name}; load the full-precision one."
        )


def groups_of(recipe: Recipe, statistics: Statistics) -> TimeGroups:
    """The time groups of a recipe on the timesteps of a calibration."""
    return statistics.groups(recipe.time)


def static_ranges(
    fits: Sequence[FittedInput],
    groups: TimeGroups,
    statistics: Statistics,
    passes: ModelPasses,
) -> dict[str, tuple[Range, ...]]:
    """Low and high of every static input, by the linear that owns it: one pair for each set or time group.

    What has to span every value is observed in a second pass; searched ranges come from the sampled rows.
    """
    requests: dict[str, RangeRequest] = {}
    for fitted in fits:
        spec = fitted.group.rule.activation
        if spec is None or spec.dynamic:
            continue
        count = groups.count if spec.per_time_group else len(fitted.distinct)
        requests[fitted.group.layers[0].name] = RangeRequest(fitted, spec, count)
    observed = {name: r for name, r in requests.items() if _observed(r.fitted.group)}
    found = dict(passes.observed_ranges(observed, groups)) if observed else {}
    for name, request in requests.items():
        if name not in found:
            found[name] = request.from_rows(groups, statistics)
    return found


def _curvature(inputs: Sequence[InputGroup], passes: ModelPasses) -> dict[str, OutputSamples]:
    """Output weights of the linears whose grids are searched with them; nothing if there are none."""
    wanted = [
        layer
        for group in inputs
        for layer in group.layers
        if "output" in {spec.range for spec in (group.rule.weight, group.rule.activation) if spec is not None}
    ]
    return dict(passes.measured_curvature(wanted)) if wanted else {}


def set_steps(recipe: Recipe, statistics: Statistics) -> list[list[int]]:
    """The timestep indices each set is fitted on: all of them for shared storage, else those of each time group."""
    if recipe.storage == "shared":
        return [list(range(len(statistics.timesteps)))]
    groups = groups_of(recipe, statistics)
    return [statistics.steps_of(groups, group) for group in range(groups.count)]


def linear_of(denoiser: nn.Module, name: str) -> nn.Linear:
    """The linear called `name`; CalibrationError if something else is there."""
    module = denoiser.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise CalibrationError(
            f"{name}: expected a linear layer, found {type(module).__name__}; load the model afresh."
        )
    return module


def without_weights(fitted: FittedInput) -> FittedInput:
    """What is known of an input, without its integers."""
    # The integers now live in the layers; keeping them here too would double the memory of the quantized model.
    # Sets that are one stay one: an input without transforms has a single set, however many time groups there are.
    bare = {id(one): one._replace(weights={}) for one in fitted.sets}
    return fitted._replace(sets=tuple(bare[id(one)] for one in fitted.sets))


def install_input(
    conversion: Conversion,
    fitted: FittedInput,
    denoiser: nn.Module,
    backend: dispatch.Backend,
    ranges: Sequence[Range],
) -> None:
    """Replace the linears of one input by quantized ones."""
    sets = fitted.distinct
    downs = [one.low_rank_down for one in sets if one.low_rank_down is not None]
    quantizer = InputQuantizer(
        [one.transform for one in sets],
        fitted.grid(ranges),
        time=conversion.time,
        backend=backend,
        readers=len(fitted.group.layers),
        simulated=not fitted.packable,
        low_rank_down=downs,
    )
    conversion.packed_bytes += quantizer.file_bytes
    for index, layer in enumerate(fitted.group.layers):
        quantized = QuantizedLinear(
            [one.weights[layer.name] for one in sets],
            linear_of(denoiser, layer.name).bias,
            quantizer,
            owns_input=index == 0,
            low_rank_up=[one.low_rank_up[layer.name] for one in sets] if downs else (),
        )
        conversion.packed_bytes += quantized.file_bytes
        replace_module(conversion.denoiser, layer.name, quantized)


def _switch(conversion: Conversion, folder: Path, statistics: Statistics) -> None:
    """Move all sets into a file and leave only the first in memory. Layers with one set for all times stay as they are."""
    kinds = (QuantizedLinear, InputQuantizer)
    modules = {n: m for n, m in conversion.denoiser.named_modules() if isinstance(m, kinds) and m.sets > 1}
    if not modules:
        return
    count = len(set_steps(conversion.recipe, statistics))
    sets = [{n: {k: b[i : i + 1] for k, b in set_buffers(m).items()} for n, m in modules.items()} for i in range(count)]
    digest = hashlib.sha256(
        (conversion.recipe.to_json() + str(statistics.about.get("fingerprint"))).encode()
    ).hexdigest()
    file = folder / f"{conversion.recipe.name}-{digest[:12]}.safetensors"
    write_sets(file, sets)
    keep_first_set(modules.values())
    conversion.switched = SwitchedSets(file, modules, denoiser=conversion.denoiser)
    conversion.time.on_change(conversion.switched.activate)
    conversion.switched.activate(conversion.time.group)
