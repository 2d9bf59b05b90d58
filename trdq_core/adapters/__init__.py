"""Models of diffusers as things that can be calibrated and compared. The only room that imports diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trdq_core.errors import ModelError
from trdq_core.plan import LayerInfo
from trdq_core.sampling import SampledModel
from trdq_core.specs import DEFAULT_LOADING, Loading


def load_adapter(
    name: str, folder: Path | None, size: Mapping[str, int] | None = None, loading: Loading = DEFAULT_LOADING
) -> SampledModel:
    """The model in `folder`, or the built-in random one where there is no folder; ModelError says what is wrong.

    `size` holds height, width and frames that are not the model's own; most families with an adapter of theirs have one size.
    """
    if folder is None:
        _check_one_size(name, size)
        from trdq_core.adapters import random_dit, random_pixart

        return random_pixart.RandomPixArt(name) if name in random_pixart.LAYERS else random_dit.RandomDiT(name)
    shown = name if name != str(folder) else None
    from trdq_core.adapters import generic, latte, pixart
    from trdq_core.adapters.folder import check_folder

    index = check_folder(folder, None)
    reads_text = index.get("text_encoder") not in (None, [None, None])
    if index["_class_name"] in latte.PIPELINES and reads_text:
        _check_one_size(name, size)
        return latte.LatteModel(folder, shown, loading)
    if index["_class_name"] in pixart.PIPELINES and reads_text:
        _check_one_size(name, size)
        return pixart.PixArtModel(folder, shown, loading)
    model = generic.TransformerModel(folder, shown, size, loading)
    model.check_size()
    return model


def _check_one_size(name: str, size: Mapping[str, int] | None) -> None:
    if size:
        asked = ", ".join(f"--{key} {value}" for key, value in size.items())
        raise ModelError(
            f"model {name}: got {asked}, and it makes one size only; leave --height, --width and --frames out."
        )


def layers_of(name: str, folder: Path | None) -> tuple[LayerInfo, ...]:
    """The linears of a model from its configuration alone: no weights are read."""
    if folder is None:
        from trdq_core.adapters import random_dit, random_pixart
        from trdq_core.adapters.roles import find_linears

        if name in random_pixart.LAYERS:
            return find_linears(random_pixart.build(random_pixart.LAYERS[name], device="meta"))
        return find_linears(random_dit.build(device="meta"))
    from trdq_core.adapters.placement import layers_from_config

    return layers_from_config(folder)


def notes_of(folder: Path | None) -> tuple[str, ...]:
    """Sentences on what of a model could not be placed, from its configuration alone."""
    if folder is None:
        return ()
    from trdq_core.adapters.placement import notes_from_config

    return notes_from_config(folder)
