"""From a checkpoint's manifest to a denoiser with the right quantized layers, empty until their tensors arrive."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trdq_core.attention_products import apply_attention, use_int8_attention
from trdq_core.checkpoints.codes import DATA, TIGHT_VERSION, takes_less, tight_shape
from trdq_core.checkpoints.describe import conversion_of, plain_config, set_name
from trdq_core.checkpoints.files import Checkpoint, dtype_name
from trdq_core.checkpoints.manifest import InputEntry, Manifest
from trdq_core.convert import Conversion
from trdq_core.errors import CheckpointError, TRDQError
from trdq_core.kernels import dispatch
from trdq_core.nn.fused_block import fuse
from trdq_core.nn.input_grid import InputGrid
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.modules import replace_module
from trdq_core.nn.quantized_attention import AttentionGrids
from trdq_core.nn.switched import SwitchedSets, keep_first_set, set_buffers
from trdq_core.plan import LayerInfo, rule_for
from trdq_core.sharing import apply_sharing
from trdq_core.specs import TIME_SPAN, LayerRule
from trdq_core.timegroups import TimeArgument, TimeContext, TimeGroups
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.stored import CodedWeight, QuantizedWeight, Weight

Modules = dict[str, nn.Module]


def install(denoiser: nn.Module, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Conversion:
    """Put empty quantized layers in the place of the linears of `denoiser`, whose configuration is `config`.

    CheckpointError if the manifest does not fit the model, or the stored tensors do not fit the layers that the recipe asks
    for. Loading then fills `denoiser.state_dict()`; `activate` does the rest.
    """
    manifest, where = checkpoint.manifest, checkpoint.folder
    try:
        _check_model(denoiser, manifest, config)
        layers = _layers(denoiser, manifest)
        time = TimeContext(TimeGroups(_edges(manifest.edges)), _calibrated(manifest))
        conversion = Conversion(
            denoiser, manifest.recipe, time, layers=tuple(layers.values()), argument=_argument(manifest),
            calibration=manifest.calibration, packed_bytes=manifest.packed_bytes,
        )  # fmt: skip
        _check_coverage(manifest, layers)
        swapped: Modules = {}
        for entry in manifest.inputs:
            swapped |= _install_input(conversion, entry, layers)
        _check_stored(denoiser, checkpoint, swapped)
        keep_first_set(swapped.values())
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (TRDQError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: its description cannot be used ({str(error)[:160]}); copy it again."
        ) from error
    if swapped:
        conversion.switched = SwitchedSets(checkpoint.files, swapped, set_name, denoiser=denoiser)
        time.on_change(conversion.switched.activate)
    return conversion


def activate(denoiser: nn.Module, manifest: Manifest) -> None:
    """After the tensors are there: kernels of the device, attention, sharing, and following the timestep."""
    conversion = conversion_of(denoiser)
    try:
        for module in denoiser.modules():
            if isinstance(module, (QuantizedLinear, InputQuantizer)):
                module.refresh()
            if isinstance(module, QuantizedLinear):
                module.fit_backend()
        conversion.fused = fuse(denoiser)
        asked = manifest.recipe.attention
        if asked is not None and asked.live:
            conversion.attention = use_int8_attention(denoiser, conversion.layers, asked)
        elif manifest.attention:
            conversion.attention = apply_attention(denoiser, _attention_grids(manifest), conversion.time)
        if manifest.recipe.sharing is not None:
            conversion.sharing = apply_sharing(denoiser, conversion.layers, manifest.recipe.sharing, conversion.time)
    except (TRDQError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint: its description cannot be used ({str(error)[:160]}); copy it again."
        ) from error
    conversion.time.attach(denoiser, conversion.argument)


def cast_passing_buffers(denoiser: nn.Module, buffers: Mapping[str, Any]) -> None:
    """Give buffers that are made anew with each model the type they had when it was saved."""
    saved = set(denoiser.state_dict())
    for name, buffer in list(denoiser.named_buffers()):
        wanted = getattr(torch, str(buffers.get(name)), None)
        if name not in saved and isinstance(wanted, torch.dtype) and buffer.is_floating_point():
            parent, _, leaf = name.rpartition(".")
            denoiser.get_submodule(parent)._buffers[leaf] = buffer.to(wanted)


def owner_of(denoiser: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The quantized module that a tensor belongs to, and its name there; None for what stayed in full precision."""
    parent, _, leaf = name.rpartition(".")
    try:
        module = denoiser.get_submodule(parent)
    except AttributeError:
        return None
    known = isinstance(module, (QuantizedLinear, InputQuantizer)) and leaf in module._buffers
    return (module, leaf) if known else None


def _argument(manifest: Manifest) -> TimeArgument:
    told = manifest.argument
    if not (math.isfinite(told.scale) and told.scale > 0):
        raise CheckpointError(f"its timestep is scaled by {told.scale}; a scale is a number above 0, copy it again.")
    return TimeArgument(told.name, told.position, told.scale, told.flipped)


def _check_model(denoiser: nn.Module, manifest: Manifest, config: Mapping[str, Any]) -> None:
    if type(denoiser).__name__ != manifest.model_class:
        raise CheckpointError(
            f"it holds a {manifest.model_class:.60} and was loaded as {type(denoiser).__name__}; use the class it is of."
        )
    if manifest.argument.name not in inspect.signature(denoiser.forward).parameters:
        raise CheckpointError(
            f"its timestep argument {manifest.argument.name!r:.60} is none of this model's; copy it again."
        )
    here = plain_config(config)
    changed = sorted(key for key, value in dict(manifest.config).items() if here.get(key) != value)
    if changed:
        raise CheckpointError(
            f"config.json was changed since it was saved ({', '.join(changed)[:100]}); copy the folder again."
        )


def _layers(denoiser: nn.Module, manifest: Manifest) -> dict[str, LayerInfo]:
    found = {}
    for entry in manifest.layers:
        linear = denoiser.get_submodule(entry.name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{entry.name:.100} is a {type(linear).__name__} in this model, not a linear layer.")
        if (linear.in_features, linear.out_features) != (entry.in_features, entry.out_features):
            raise CheckpointError(
                f"{entry.name:.100} maps {linear.in_features} to {linear.out_features} channels in this model, "
                f"not {entry.in_features} to {entry.out_features}."
            )
        found[entry.name] = LayerInfo(**entry.to_dict())
    return found


def _edges(edges: Sequence[float]) -> tuple[float, ...]:
    rising = all(a < b for a, b in itertools.pairwise(edges))
    if not rising or any(not 0 < edge < TIME_SPAN for edge in edges) or len(edges) >= 1000:
        raise CheckpointError("its time groups are no rising timesteps between 0 and 1000; copy it again.")
    return tuple(edges)


def _calibrated(manifest: Manifest) -> tuple[float, float] | None:
    if len(manifest.calibrated) not in (0, 2):
        raise CheckpointError("its calibrated range is not two timesteps; copy it again.")
    return (manifest.calibrated[0], manifest.calibrated[1]) if manifest.calibrated else None


def _check_coverage(manifest: Manifest, layers: Mapping[str, LayerInfo]) -> None:
    """Exactly the layers that the recipe quantizes are quantized, each once."""
    listed = [name for entry in manifest.inputs for name in entry.layers]
    wanted = {name for name, layer in layers.items() if rule_for(layer, manifest.recipe) is not None}
    if len(listed) != len(set(listed)) or set(listed) != wanted:
        odd = sorted(set(listed) ^ wanted)
        raise CheckpointError(
            f"its quantized layers are not those of its recipe ({', '.join(odd)[:100] or 'one twice'}); copy it again."
        )


def _install_input(conversion: Conversion, entry: InputEntry, layers: Mapping[str, LayerInfo]) -> Modules:
    """Replace the linears of one input; returns the modules whose sets are switched, all of their sets still empty."""
    denoiser = conversion.denoiser
    infos = [layers[name] for name in entry.layers]
    rules = [rule_for(layer, conversion.recipe) for layer in infos]
    rule = rules[0]
    if rule is None or any(other != rule for other in rules) or len({layer.in_features for layer in infos}) != 1:
        raise CheckpointError(f"{entry.layers[0]:.100}: the linears of its input do not fit together; copy it again.")
    groups = conversion.time.groups.count
    _check_entry(entry, rule, infos[0], groups)
    ranges = tuple(zip(entry.ranges[::2], entry.ranges[1::2], strict=True))
    coded = any(isinstance(_empty_weight(rule, layer), CodedWeight) for layer in infos)
    quantizer = InputQuantizer(
        [_empty_transform(entry, infos[0].in_features)] * entry.sets,
        InputGrid(rule.activation, entry.clips, ranges),
        time=conversion.time,
        backend=dispatch.select_backend(torch.device("cpu")),
        readers=len(infos),
        simulated=coded,
        low_rank_down=[torch.empty(entry.rank, infos[0].in_features, device="meta")] * entry.sets if entry.rank else (),
    )
    found: Modules = {}
    for index, layer in enumerate(infos):
        linear = denoiser.get_submodule(layer.name)
        up = torch.empty(layer.out_features, entry.rank, device="meta")
        quantized = QuantizedLinear(
            [_empty_weight(rule, layer)] * entry.sets,
            None if linear.bias is None else torch.empty(layer.out_features, device="meta"),
            quantizer,
            owns_input=index == 0,
            low_rank_up=[up] * entry.sets if entry.rank else (),
        )
        replace_module(denoiser, layer.name, quantized)
        found[layer.name] = quantized
    found[f"{infos[0].name}.input_quantizer"] = quantizer
    return found if conversion.recipe.storage == "switched" and entry.sets > 1 else {}


def _check_entry(entry: InputEntry, rule: LayerRule, layer: LayerInfo, groups: int) -> None:
    channels, name = layer.in_features, layer.name
    blocks = (entry.rotation, entry.second_rotation, entry.hadamard_block)
    if entry.sets not in (1, groups):
        raise CheckpointError(f"{name:.100}: {entry.sets} sets for {groups} time groups; there is one, or one a group.")
    if any(block < 0 or (block and channels % block) for block in blocks):
        raise CheckpointError(f"{name:.100}: a rotation does not divide its {channels} channels; copy it again.")
    if entry.rank != (0 if rule.low_rank is None else entry.rank) or not 0 <= entry.rank <= channels:
        raise CheckpointError(f"{name:.100}: its recipe knows no low-rank branch of rank {entry.rank}; copy it again.")
    numbers = (*entry.clips, *entry.ranges)
    static = rule.activation is not None and not rule.activation.dynamic
    counts = {0} if not static else {2, 2 * groups, 2 * entry.sets}
    if not all(math.isfinite(n) for n in numbers) or len(entry.clips) not in (1, entry.sets):
        raise CheckpointError(f"{name:.100}: its clipping factors do not fit its sets; copy it again.")
    if len(entry.ranges) not in counts:
        raise CheckpointError(f"{name:.100}: its static ranges do not fit its recipe; copy it again.")


def _empty_transform(entry: InputEntry, channels: int) -> InputTransform:
    def matrix(side: int) -> Tensor | None:
        return torch.empty(side, side, dtype=torch.float16, device="meta") if side else None

    return InputTransform(
        inverse_scale=torch.empty(channels, device="meta") if entry.scale else None,
        rotation=matrix(entry.rotation),
        permutation=torch.empty(channels, dtype=torch.int32, device="meta") if entry.permutation else None,
        hadamard_block=entry.hadamard_block,
        second_rotation=matrix(entry.second_rotation),
    )


def _empty_weight(rule: LayerRule, layer: LayerInfo) -> Weight:
    """A weight of the kind that the rule's grid makes, sizes without numbers."""
    spec, shape = rule.weight, (layer.out_features, layer.in_features)
    assert spec is not None  # only quantized layers come here
    if spec.grid == "twin_log" or (spec.group_size is not None and not spec.two_level):
        size = spec.group_size or layer.in_features
        count = 1 if spec.grid == "uniform" and spec.symmetric else 2
        parameters = torch.empty(layer.out_features, layer.in_features // size, count, device="meta")
        codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        return CodedWeight(codes, parameters, spec.grid, size, spec.bits)
    groups = layer.in_features // spec.group_size if spec.group_size else 0
    return QuantizedWeight(
        torch.empty(shape, dtype=torch.int8, device="meta"),
        torch.empty(layer.out_features, device="meta"),
        None if spec.symmetric else torch.empty(layer.out_features, device="meta"),
        torch.empty(layer.out_features, groups, dtype=torch.int8, device="meta") if groups else None,
        spec.group_size or 0,
        spec.bits,
    )


def _check_stored(denoiser: nn.Module, checkpoint: Checkpoint, swapped: Modules) -> None:
    """The stored tensors are those of the layers: names, shapes, and types of all that is quantized."""
    wanted: dict[str, tuple[str | None, tuple[int, ...]]] = {
        name: (None, tuple(tensor.shape)) for name, tensor in denoiser.state_dict().items()
    }
    for prefix, module in denoiser.named_modules():
        if isinstance(module, (QuantizedLinear, InputQuantizer)):
            for leaf, buffer in module.named_buffers(recurse=False):
                wanted[f"{prefix}.{leaf}"] = (dtype_name(leaf, buffer), tuple(buffer.shape))
    for prefix, module in swapped.items():
        for leaf, buffer in set_buffers(module).items():
            for group in range(module.sets):
                wanted[set_name(group, f"{prefix}.{leaf}")] = (dtype_name(leaf, buffer), (1, *buffer.shape[1:]))
    tight = {} if swapped else _tight(denoiser)
    if checkpoint.manifest.format_version >= TIGHT_VERSION:
        if not tight:
            raise CheckpointError(
                f"it says format {TIGHT_VERSION} and holds nothing that needs it; copy the folder again."
            )
        wanted |= {f"{name}.{DATA}": ("U8", tight_shape(layer)) for name, layer in tight.items()}
    stored = {entry.name: entry for entry in checkpoint.manifest.tensors}
    for name in sorted({*wanted, *stored}):
        if name not in stored:
            raise CheckpointError(f"tensor {name:.100} is missing; copy the folder again.")
        if name not in wanted:
            raise CheckpointError(f"tensor {name:.100} belongs to no layer of its recipe; copy the folder again.")
        kind, shape = wanted[name]
        entry = stored[name]
        if entry.shape != shape or kind not in (None, entry.dtype):
            raise CheckpointError(
                f"tensor {name:.100} is {entry.dtype} {list(entry.shape)}, its recipe makes {kind or 'any type'} "
                f"{list(shape)}; copy the folder again."
            )


def _tight(denoiser: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers whose integers a file of this version holds without a gap."""
    found = {name: one for name, one in denoiser.named_modules() if isinstance(one, QuantizedLinear)}
    return {name: layer for name, layer in found.items() if layer.integer and takes_less(layer.weight_bits)}


def _attention_grids(manifest: Manifest) -> dict[str, AttentionGrids]:
    return {
        entry.name: AttentionGrids(
            torch.tensor(entry.q_scale), torch.tensor(entry.k_scale), torch.tensor(entry.v_scale),
            entry.bits, entry.softmax_bits, entry.thresholds, TimeGroups(_edges(entry.edges)),
        )
        for entry in manifest.attention
    }  # fmt: skip
