"""From a quantized denoiser to what is written: its tensors by name, and the manifest that describes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trdq_core.checkpoints.codes import DATA, TIGHT_VERSION, takes_less, to_file
from trdq_core.checkpoints.files import describe_tensors, tensor_digest
from trdq_core.checkpoints.manifest import (
    FIRST_VERSION,
    SET_PREFIX,
    AttentionEntry,
    InputEntry,
    LayerEntry,
    Manifest,
    TimeEntry,
)
from trdq_core.convert import Conversion
from trdq_core.errors import CheckpointError
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.timegroups import time_argument

OWN_KEYS = ("quantization_config",)  # of a model's configuration, beside those that begin with an underscore


def conversion_of(denoiser: nn.Module) -> Conversion:
    """The conversion that `denoiser` came from; CheckpointError if it is no changed denoiser."""
    found = getattr(denoiser, "trdq_conversion", None)
    if not isinstance(found, Conversion):
        raise CheckpointError(
            f"{type(denoiser).__name__}: it was not quantized by TR-DQ Studio; convert it first, then save it."
        )
    return found


def set_name(group: int, name: str) -> str:
    """What the buffer "module.buffer" of a set is called: the first set stands under the model's own names."""
    return name if group == 0 else f"{SET_PREFIX}{group}.{name}"


def stored_tensors(conversion: Conversion, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that a checkpoint of the state `tensors` holds: with switched storage every set, whichever is active."""
    found, switched = dict(tensors), conversion.switched
    if switched is not None:
        for group in range(conversion.time.groups.count):
            # Copied, so that saving over the very file they are mapped from cannot pull it away.
            found |= {set_name(group, name): switched.tensor(group, name).clone() for name in switched.names()}
    meta = next((name for name, tensor in found.items() if tensor.is_meta), None)
    if meta is not None:
        raise CheckpointError(f"{meta}: it is offloaded, so it cannot be saved; remove the offloading hooks first.")
    return _as_in_a_file(conversion, found)


def stored_sizes(conversion: Conversion) -> dict[str, Tensor]:
    """The tensors of `stored_tensors` without their numbers, on the meta device: nothing is copied."""
    found, switched = (
        {name: one.to("meta") for name, one in conversion.denoiser.state_dict().items()},
        conversion.switched,
    )
    if switched is not None:
        for group in range(conversion.time.groups.count):
            found |= {set_name(group, name): switched.tensor(group, name).to("meta") for name in switched.names()}
    return _as_in_a_file(conversion, found)


def _as_in_a_file(conversion: Conversion, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, layer in conversion.quantized_layers().items():
        if layer.integer:
            tight = _is_tight(conversion, layer)
            kept = {key: tensors[key] for key in _all_sets(conversion, f"{name}.{DATA}") if key in tensors}
            tensors |= {key: to_file(layer, data, tight=tight) for key, data in kept.items()}
    return tensors


def _all_sets(conversion: Conversion, name: str) -> list[str]:
    count = conversion.time.groups.count if conversion.switched is not None else 1
    return [set_name(group, name) for group in range(count)]


def _is_tight(conversion: Conversion, layer: QuantizedLinear) -> bool:
    """Whether a layer's integers are written without a gap: not where sets are used as they lie in the file."""
    return layer.integer and takes_less(layer.weight_bits) and conversion.switched is None


def format_version(conversion: Conversion) -> int:
    """The oldest version of the format that holds a conversion."""
    tight = any(_is_tight(conversion, layer) for layer in conversion.quantized_layers().values())
    return TIGHT_VERSION if tight else FIRST_VERSION


def describe(
    conversion: Conversion,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    digest: Callable[[Tensor], str] = tensor_digest,
) -> Manifest:
    """The manifest of a denoiser whose stored tensors are `tensors` and whose model configuration is `config`."""
    denoiser, time = conversion.denoiser, conversion.time
    processors = conversion.attention.processors if conversion.attention is not None else {}
    return Manifest(
        format_version=format_version(conversion),
        recipe=conversion.recipe,
        model_class=type(denoiser).__name__,
        argument=TimeEntry(**time_argument(conversion.argument)._asdict()),
        edges=tuple(time.groups.edges),
        calibrated=tuple(time.calibrated or ()),
        calibration=conversion.calibration,
        dtype=plain_dtype(denoiser),
        packed_bytes=conversion.packed_bytes,
        config=plain_config(config),
        buffers=passing_buffers(denoiser),
        layers=tuple(LayerEntry(**layer._asdict()) for layer in conversion.layers),
        inputs=_inputs(conversion),
        attention=tuple(
            AttentionEntry(
                name=name, bits=grids.bits, softmax_bits=grids.softmax_bits, thresholds=grids.thresholds,
                edges=tuple(grids.groups.edges), q_scale=_numbers(grids.q_scale), k_scale=_numbers(grids.k_scale),
                v_scale=_numbers(grids.v_scale),
            )
            for name, grids in ((name, processor.grids) for name, processor in processors.items())
        ),
        tensors=describe_tensors(tensors, digest),
    )  # fmt: skip


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration as JSON values, without what belongs to this or that copy of it."""
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in OWN_KEYS}
    return json.loads(json.dumps(kept, default=str))


def plain_dtype(denoiser: nn.Module) -> str:
    """The type of what stayed in full precision, "float32" where nothing did."""
    found = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")


def passing_buffers(denoiser: nn.Module) -> dict[str, str]:
    """Types of the floating-point buffers that are made anew with each model, such as tables of positions.

    A model that was cast has them in its type, one that was loaded keeps them in fp32, and pictures differ by that.
    """
    saved = set(denoiser.state_dict())
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in denoiser.named_buffers()
        if name not in saved and buffer.is_floating_point()
    }


def _inputs(conversion: Conversion) -> tuple[InputEntry, ...]:
    readers: dict[int, tuple[InputQuantizer, list[str]]] = {}
    for name, layer in conversion.denoiser.named_modules():
        if isinstance(layer, QuantizedLinear):
            readers.setdefault(id(layer.input_quantizer), (layer.input_quantizer, []))[1].append(name)
    return tuple(_input_entry(conversion, quantizer, names) for quantizer, names in readers.values())


def _input_entry(conversion: Conversion, quantizer: InputQuantizer, names: list[str]) -> InputEntry:
    switched = conversion.switched
    swapped = switched is not None and any(module is quantizer for module in switched.modules.values())
    down = quantizer.low_rank_down
    return InputEntry(
        layers=tuple(names),
        sets=conversion.time.groups.count if swapped else quantizer.sets,
        scale=quantizer.inverse_scale is not None,
        permutation=quantizer.permutation is not None,
        rotation=_side(quantizer.rotation),
        second_rotation=_side(quantizer.second_rotation),
        hadamard_block=quantizer.hadamard_block,
        rank=0 if down is None else down.shape[1],
        clips=tuple(float(clip) for clip in quantizer.grid.clips),
        ranges=tuple(float(end) for pair in quantizer.grid.ranges for end in pair),
    )


def _side(rotation: Tensor | None) -> int:
    return 0 if rotation is None else rotation.shape[-1]


def _numbers(scale: Tensor) -> tuple[float, ...]:
    return tuple(scale.detach().float().cpu().tolist())  # every fp32 number is a float64 number, so nothing is lost
