"""What transformers does with a TRDQConfig: it refuses it with the sentence that says where one belongs."""

from __future__ import annotations

from types import ModuleType
from typing import NoReturn

from trdq_core.errors import RecipeError


def register(registry: ModuleType) -> None:
    """Write the refusal into the dictionary of `transformers.quantizers.auto`, whose own words name only other methods."""
    registry.AUTO_QUANTIZER_MAPPING["trdq"] = refuse


def refuse(config: object, **_: object) -> NoReturn:
    """In place of making a quantizer for a model of transformers."""
    raise RecipeError(
        "TRDQConfig: it was given for a model of transformers, such as a text encoder, and only transformer denoisers of "
        'diffusers are quantized here; name "transformer" in quant_mapping.'
    )
