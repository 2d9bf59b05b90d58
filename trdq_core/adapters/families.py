"""What is known of families of pipelines, as data: how they tell time, how guidance runs, which settings they want.

What is not listed here is found out by `adapters.probe`; a test checks the list against the probe.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from trdq_core.timegroups import TimeArgument

# How guidance runs. "joint": one call, unconditional half first; "joint_reversed": conditional half first; "two_calls": one
# call a branch; "embedded": the guidance is an input of the denoiser, there is no second branch.
GuidanceLayout = Literal["joint", "joint_reversed", "two_calls", "embedded"]


# What the argument is called that tells a denoiser the time.
TIME_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "timestep_ids")


class Family(NamedTuple):
    """One family, by the class of its transformer. `scale` and `flipped` are those of TimeArgument."""

    title: str
    scale: float = 1.0
    flipped: bool = False
    layout: GuidanceLayout = "joint"
    fps: float | None = None  # of the clips it was trained on; None where it makes pictures


FAMILIES: Mapping[str, Family] = {
    "DiTTransformer2DModel": Family("DiT", layout="joint_reversed"),
    "PixArtTransformer2DModel": Family("PixArt-alpha, PixArt-Sigma"),
    "SD3Transformer2DModel": Family("Stable Diffusion 3, 3.5"),
    "FluxTransformer2DModel": Family("FLUX.1", scale=1000, layout="two_calls"),
    "SanaTransformer2DModel": Family("Sana"),
    "HunyuanDiT2DModel": Family("HunyuanDiT"),
    "Lumina2Transformer2DModel": Family("Lumina 2", scale=1000, flipped=True, layout="two_calls"),
    "AuraFlowTransformer2DModel": Family("AuraFlow", scale=1000),
    "CogView4Transformer2DModel": Family("CogView4", layout="two_calls"),
    "QwenImageTransformer2DModel": Family("Qwen-Image", scale=1000, layout="two_calls"),
    "ZImageTransformer2DModel": Family("Z-Image", scale=1000, flipped=True, layout="joint_reversed"),
    "LatteTransformer3DModel": Family("Latte", fps=8),
    "CogVideoXTransformer3DModel": Family("CogVideoX", fps=8),
    "WanTransformer3DModel": Family("Wan 2.1, Wan 2.2 with one transformer", layout="two_calls", fps=16),
    "LTXVideoTransformer3DModel": Family("LTX-Video", fps=25),
    "HunyuanVideoTransformer3DModel": Family("HunyuanVideo", layout="two_calls", fps=15),
}

# Settings of a pipeline's call, set wherever it has them: text is not cleaned by packages that may be absent, and the size
# asked for is the size sampled.
CALL_SETTINGS: Mapping[str, Any] = {
    "clean_caption": False,
    "use_resolution_binning": False,
    "prompt": None,
    "negative_prompt": None,
    "return_dict": False,
}


def known_time(transformer: nn.Module) -> TimeArgument | None:
    """How a transformer of a listed family is told the time, None for others."""
    family = family_of(transformer)
    if family is None:
        return None
    names = [name for name in inspect.signature(type(transformer).forward).parameters if name != "self"]
    name = "timestep" if "timestep" in names else "t"
    own_scale = float(transformer.config.get("timestep_scale") or 1.0)  # a factor that its pipelines multiply in
    return TimeArgument(name, names.index(name), family.scale / own_scale, family.flipped)


def time_by_name(transformer: nn.Module) -> TimeArgument:
    """How a transformer is told the time, as far as class and names say it: those of unlisted families may count otherwise."""
    names = [name for name in inspect.signature(type(transformer).forward).parameters if name != "self"]
    likely = next((name for name in names if name in TIME_NAMES), None)
    found = known_time(transformer)
    return found or (TimeArgument() if likely is None else TimeArgument(likely, names.index(likely)))


def family_of(transformer: object) -> Family | None:
    """What is known of a transformer's family, None for one that nobody here has seen."""
    return FAMILIES.get(type(transformer).__name__)
