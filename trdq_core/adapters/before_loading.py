"""A look at every local folder before diffusers builds a model from it, in place of minutes of building what is refused then."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from trdq_core.checkpoints.before import check_before_loading


def guard_loading(module: ModuleType) -> None:
    """Have `from_pretrained` in `diffusers.models.modeling_utils` look at a local folder first.

    A quantizer is asked only after the model was built from config.json, and not at all where quantization_config is gone
    from there: random layers would be loaded, and warnings would be all that says so.
    """
    kind = module.ModelMixin
    load = kind.from_pretrained.__func__
    if hasattr(load, "trdq_guarded"):
        return

    @functools.wraps(load)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        named = pretrained_model_name_or_path
        if isinstance(named, (str, os.PathLike)) and os.path.isdir(named):  # else an id of the hub, or nothing
            folder = Path(named) / (kwargs.get("subfolder") or "")
            check_before_loading(folder, cls.__name__, kwargs.get("variant"))
        return load(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.trdq_guarded = True
    kind.from_pretrained = classmethod(from_pretrained)
