"""Flags about models: which to use, where else to look for them, fetching one, looking into one. No torch."""

from __future__ import annotations

import argparse
from typing import Any

from trdq_core.specs import OFFLOADS, PRECISIONS

ROOT_HELP = "also list the diffusers folders in DIR, by name"


def add_model_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Which model, and where else models are."""
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"a name from the models command, or a diffusers folder (default {default})")
    add("--model-root", metavar="DIR", help=ROOT_HELP)


def add_anyway(parser: argparse.ArgumentParser) -> None:
    """Going on where memory seems short."""
    parser.add_argument(
        "--anyway", action="store_true", help="load the model even where the memory check says that it does not fit"
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """In which precision the model is loaded, and what of it waits outside of the GPU."""
    add = parser.add_argument
    add(
        "--dtype",
        choices=PRECISIONS,
        help="precision of the full-precision model (default auto: FP32 on a CPU, as it was published on a GPU)",
    )
    add(
        "--offload",
        choices=OFFLOADS,
        help="keep text encoders and autoencoder off the GPU while they do nothing, whole (model) or layer by layer "
        "(sequential); the denoiser stays on it (default none)",
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    """A LoRA that is added to the weights before anything is measured or quantized."""
    add = parser.add_argument
    add("--lora", metavar="FILE", help="a LoRA in safetensors to add to the model's weights first; needs peft")
    add("--lora-scale", type=float, metavar="X", help="what it is multiplied by (default 1)")


def add_size(parser: argparse.ArgumentParser) -> None:
    """How large pictures or clips are, of models that make several sizes."""
    for name, unit in (("height", "pixels"), ("width", "pixels"), ("frames", "frames of a clip")):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{unit}, where the pipeline takes it (default: its own)"
        )


def add_models_command(commands: Any) -> argparse.ArgumentParser:
    """The command that lists models."""
    one = commands.add_parser("models", help="list the models at hand", argument_default=argparse.SUPPRESS)
    one.add_argument("--model-root", metavar="DIR", help=ROOT_HELP)
    return one


def add_download_command(commands: Any) -> argparse.ArgumentParser:
    """The command that fetches a model."""
    summary = "fetch a model of the hub: safetensors only, no code; its size and the free disk are looked at first"
    one = commands.add_parser("download", help=summary, description=summary, argument_default=argparse.SUPPRESS)
    one.add_argument("name", metavar="NAME", help="a name from the models command, or an id such as maxin-cn/Latte-1")
    one.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    return one


def add_runs_command(commands: Any) -> argparse.ArgumentParser:
    """The command that lists runs."""
    return commands.add_parser("runs", help="list the stored runs, newest first", argument_default=argparse.SUPPRESS)


def add_activations_command(commands: Any) -> argparse.ArgumentParser:
    """The command that looks into a layer; model and recipe flags come on top."""
    summary = "show the input of a layer before and after a recipe's transform, from a stored calibration"
    one = commands.add_parser("activations", help=summary, description=summary, argument_default=argparse.SUPPRESS)
    add = one.add_argument
    add("--layer", metavar="NAME", help="the layer whose input to look at (default: the first)")
    add("--group", type=int, metavar="N", help="the group of timesteps, 0 being that of the smallest (default 0)")
    add("--calibration", metavar="ID", help="the fingerprint of a stored calibration (default: the newest)")
    return one
