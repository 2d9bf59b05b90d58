"""The quantizer that diffusers finds under "trdq": loading and saving quantized denoisers by its own functions.

Registered by `trdq_core.registration` as soon as both packages are imported.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from trdq_core.adapters.lora import refuse_lora
from trdq_core.checkpoints.codes import DATA, from_file
from trdq_core.checkpoints.describe import conversion_of, describe, format_version, plain_dtype, stored_tensors
from trdq_core.checkpoints.files import Checkpoint, check_contents, open_checkpoint
from trdq_core.checkpoints.manifest import FIRST_VERSION, KEY, SET_PREFIX, check_version
from trdq_core.checkpoints.restore import activate, cast_passing_buffers, install, owner_of
from trdq_core.checkpoints.size import file_bytes
from trdq_core.convert import Conversion, convert, on_conversion
from trdq_core.data_free import convert_without_data
from trdq_core.errors import CheckpointError, RecipeError
from trdq_core.kernels import dispatch
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.modules import align
from trdq_core.plan import rule_for
from trdq_core.presets import parse_recipe
from trdq_core.specs import Recipe
from trdq_core.statistics import Statistics


class TRDQMethod(StrEnum):
    """The name of this method in diffusers, which reads its `value`: a plain string has none."""

    TRDQ = "trdq"


class TRDQConfig(QuantizationConfigMixin):
    """How a denoiser is quantized, for `from_pretrained(..., quantization_config=TRDQConfig("rtn-w8a8"))`.

    `recipe`: a name such as "rtn-w4a8", a Recipe, or its dictionary. `calibration`: a folder with statistics of the model, for
    recipes that take one. In the config.json of a saved model it says what the weights beside it are.
    """

    def __init__(
        self,
        recipe: str | Recipe | Mapping[str, Any] = "rtn-w8a8",
        calibration: str | Path | None = None,
        *,
        dtype: str | None = None,
        format_version: int = FIRST_VERSION,
        quant_method: str = TRDQMethod.TRDQ,
        **unknown: Any,
    ) -> None:
        check_version(format_version, "config.json")
        if unknown:
            raise RecipeError(
                f"TRDQConfig: unknown key {', '.join(sorted(unknown))[:100]}; allowed are recipe and calibration."
            )
        if quant_method != TRDQMethod.TRDQ.value:
            raise RecipeError(f'TRDQConfig: quant_method is {quant_method!r:.40}; allowed is "trdq".')
        if isinstance(recipe, str):
            recipe = parse_recipe(recipe)
        self.quant_method = TRDQMethod.TRDQ
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
        self.calibration = None if calibration is None else Path(calibration)
        self.dtype = dtype
        self.format_version = format_version

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: plain JSON values, no path of this machine."""
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "dtype": self.dtype,
            "recipe": self.recipe.to_dict(),
        }

    def __repr__(self) -> str:
        return f"TRDQConfig(recipe={self.recipe.name!r}, format_version={self.format_version})"


class TRDQQuantizer(DiffusersQuantizer):
    """Loads what `save_quantized` wrote, quantizes at loading where no activations are needed, saves what is in memory."""

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: TRDQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.conversion: Conversion | None = None
        self._checkpoint: Checkpoint | None = None
        self._dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # That of a copied model, whose layers no conversion is kept for: it must not save them as another model's.
        twin = copy.copy(self)
        twin.conversion = None
        return twin

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse placing layers on disk, where they would be cast."""
        places = kwargs.get("device_map")
        if isinstance(places, Mapping) and "disk" in places.values():
            raise CheckpointError(
                'device_map: it puts layers on "disk", and quantized layers stay in memory; use "cpu", or a larger max_memory.'
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """What stayed in full precision comes back in the type it was saved in, unless another is asked for."""
        stored = getattr(torch, str(self.quantization_config.dtype), None)
        if torch_dtype is None and isinstance(stored, torch.dtype):
            torch_dtype = stored
        self._dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The keys to load, once the files are found to be what they say. Sets of other time groups stay in the files."""
        if not self.pre_quantized:
            return loaded_keys
        self._checkpoint = open_checkpoint(checkpoint_files)
        self._check_agreement(self._checkpoint, loaded_keys)
        return [key for key in loaded_keys if not key.startswith(SET_PREFIX)]

    def _check_agreement(self, checkpoint: Checkpoint, loaded_keys: list[str]) -> None:
        where = checkpoint.folder
        if set(loaded_keys) != set(checkpoint.places):
            raise CheckpointError(f"{where}: the index names other tensors than its files hold; copy the folder again.")
        if checkpoint.manifest.recipe != self.quantization_config.recipe:
            raise CheckpointError(
                f"{where}: config.json names another recipe than the weights were made with; copy the folder again."
            )
        if checkpoint.manifest.format_version != self.quantization_config.format_version:
            raise CheckpointError(
                f"{where}: config.json names another format than the weights were saved in; copy the folder again."
            )
        if checkpoint.manifest.dtype != self.quantization_config.dtype:
            raise CheckpointError(
                f"{where}: config.json names another type than the weights were saved in; copy the folder again."
            )

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor is of a quantized layer, which keeps the type it is stored in."""
        return self.pre_quantized and owner_of(model, param_name) is not None

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a stored tensor in its place, in its own type: `param_value` was cast to torch_dtype on the way."""
        found = owner_of(model, param_name)
        assert found is not None  # check_if_quantized_param was asked before
        module, name = found
        stored = state_dict[param_name].detach()
        if name == DATA and isinstance(module, QuantizedLinear):
            stored = from_file(module, stored)
        # A copy of its own: the loaded one may be mapped from the file, and switched sets write into buffers.
        module._buffers[name] = stored.clone().to(target_device)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._check_part(model)
            return
        assert self._checkpoint is not None  # diffusers names the files before it prepares the model
        install(model, self._checkpoint, model.config)
        check_contents(self._checkpoint)

    def _check_part(self, model: nn.Module) -> None:
        """RecipeError for a part of a pipeline, such as an autoencoder, of which the recipe would quantize nothing."""
        from trdq_core.adapters.roles import find_linears

        recipe = self.quantization_config.recipe
        if recipe.quantized and not any(rule_for(layer, recipe) for layer in find_linears(model)):
            raise RecipeError(
                f"{type(model).__name__}: {recipe.name} quantizes none of its layers; TRDQConfig is for transformer denoisers, "
                'name "transformer" in quant_mapping.'
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        align(model)
        if self.pre_quantized:
            assert self._checkpoint is not None  # as above
            manifest = self._checkpoint.manifest
            if self._dtype is None or str(self._dtype) == f"torch.{manifest.dtype}":
                cast_passing_buffers(model, manifest.buffers)
            align(model)  # before anything is derived from its tensors
            activate(model, manifest)
            self.adopt(conversion_of(model))
            return model
        # Not above: diffusers is half imported when this module is.
        from trdq_core.adapters.families import time_by_name
        from trdq_core.adapters.roles import find_linears

        config, argument = self.quantization_config, time_by_name(model)
        backend, layers = dispatch.select_backend(next(model.parameters()).device), find_linears(model)
        if config.calibration is None:
            found = convert_without_data(model, layers, config.recipe, backend=backend, argument=argument)
        else:
            statistics, sets = Statistics.load(config.calibration), config.calibration / "sets"
            found = convert(
                model, layers, config.recipe, statistics, backend=backend, storage_folder=sets, argument=argument,
                in_place=True,
            )  # fmt: skip
        self.adopt(found)
        return model

    def adopt(self, conversion: Conversion) -> None:
        """Let a quantized model be saved by save_pretrained."""
        config, self.conversion = self.quantization_config, conversion
        config.dtype, config.format_version = plain_dtype(conversion.denoiser), format_version(conversion)
        # The way that reaches config.json: setting an attribute of the configuration does not.
        conversion.denoiser.register_to_config(quantization_config=config)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """All sets, and the manifest for the headers. CheckpointError for pickles, which are not written."""
        if not safe_serialization:
            raise CheckpointError(
                "save_pretrained: quantized models are saved as safetensors; leave safe_serialization on."
            )
        conversion = self._conversion()
        tensors = stored_tensors(conversion, state_dict)
        return tensors, {KEY: describe(conversion, tensors, conversion.denoiser.config).text()}

    @property
    def is_serializable(self) -> bool:
        """Whether save_pretrained works; CheckpointError for a copy of a quantized model.

        It is what save_pretrained asks first, before anything is written, so config.json is brought up to date here: a model
        may have been cast since it was quantized.
        """
        self.adopt(self._conversion())
        return True

    def _conversion(self) -> Conversion:
        if self.conversion is None:
            raise CheckpointError(
                "save_pretrained: this model is a copy of a quantized one; save the model that was converted or loaded."
            )
        return self.conversion

    @property
    def is_trainable(self) -> bool:
        """Whether gradients reach the quantized weights."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the model."""
        return True


def make_saveable(conversion: Conversion) -> None:
    """Let diffusers' own save_pretrained write a converted denoiser of diffusers as what it is, and refuse LoRAs for it.

    Without the quantizer the packed weights would be written without a word of what they are, and come back as random ones.
    """
    denoiser = conversion.denoiser
    denoiser.load_lora_adapter = denoiser.add_adapter = refuse_lora  # in place of what diffusers would try
    if hasattr(denoiser, "register_to_config") and hasattr(denoiser, "save_pretrained"):
        quantizer = TRDQQuantizer(TRDQConfig(conversion.recipe), pre_quantized=True)
        quantizer.adopt(conversion)
        conversion.count_file = file_bytes
        denoiser.hf_quantizer, denoiser.quantization_method = quantizer, TRDQMethod.TRDQ


def register(registry: ModuleType) -> None:
    """Write the quantizer and its configuration into the two dictionaries of `diffusers.quantizers.auto`.

    From then on every conversion is saved as what it is.
    """
    on_conversion(make_saveable)
    registry.AUTO_QUANTIZER_MAPPING[TRDQMethod.TRDQ.value] = TRDQQuantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[TRDQMethod.TRDQ.value] = TRDQConfig
