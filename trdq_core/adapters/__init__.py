"""Models of diffusers as things that can be calibrated and compared. The only room that imports diffusers."""

from __future__ import annotations

from pathlib import Path

from trdq_core.plan import LayerInfo
from trdq_core.sampling import SampledModel


def load_adapter(name: str, folder: Path | None) -> SampledModel:
    """The model in `folder`, or the built-in random one where there is no folder; ModelError says what is wrong."""
    if folder is None:
        from trdq_core.adapters import random_dit, random_pixart

        return random_pixart.RandomPixArt(name) if name in random_pixart.LAYERS else random_dit.RandomDiT(name)
    shown = name if name != str(folder) else None
    if _is_video(folder):
        from trdq_core.adapters.latte import LatteModel

        return LatteModel(folder, shown)
    from trdq_core.adapters.pixart import PixArtModel

    return PixArtModel(folder, shown)


def layers_of(name: str, folder: Path | None) -> tuple[LayerInfo, ...]:
    """The linears of a model from its configuration alone: no weights are read."""
    if folder is None:
        from trdq_core.adapters import random_dit, random_pixart
        from trdq_core.adapters.roles import find_linears

        if name in random_pixart.LAYERS:
            return find_linears(random_pixart.build(random_pixart.LAYERS[name], device="meta"))
        return find_linears(random_dit.build(device="meta"))
    if _is_video(folder):
        from trdq_core.adapters import latte

        return latte.layers_from_config(folder)
    from trdq_core.adapters import pixart

    return pixart.layers_from_config(folder)


def _is_video(folder: Path) -> bool:
    """Whether the folder holds a pipeline that makes clips; ModelError if it holds none that is supported."""
    from trdq_core.adapters import latte, pixart
    from trdq_core.adapters.folder import check_folder

    return check_folder(folder, (*pixart.PIPELINES, *latte.PIPELINES))["_class_name"] in latte.PIPELINES
