"""Other tools that stand in place of a recipe: which are at hand, what they are called, what their rows say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trdq_core.errors import RecipeError
from trdq_core.presets import PEERS, find_peer, missing, peer_recipe
from trdq_core.presets.peers import EVERY_LINEAR, PREFIX
from trdq_core.specs import Recipe

GROUP = "Other tool"
TITLES = {
    "torch-compile": "torch.compile",
    "torchao-int8": "torchao int8",
    "torchao-int8-compile": "torchao int8, compiled",
    "sdnq-int8": "SDNQ int8",
    "sdnq-int8-hadamard": "SDNQ int8, Hadamard",
    "quanto-int8": "quanto int8",
    "quanto-int8-weights": "quanto int8 weights",
    "bitsandbytes-int8": "bitsandbytes LLM.int8()",
    "openvino-fp32": "OpenVINO FP32",
    "openvino-bf16": "OpenVINO BF16",
    "openvino-int8-weights": "OpenVINO int8 weights",
    "openvino-int8": "OpenVINO INT8",
    "openvino-int8-fp32": "OpenVINO INT8, rest FP32",
}


def is_peer(name: Any) -> bool:
    """Whether a recipe of this name hands the model to another tool."""
    return str(name).startswith(PREFIX)


def title_of_peer(name: str) -> str:
    """ "torchao int8" for "peer-torchao-int8"; what has no title of its own keeps its name."""
    own = name.removeprefix(PREFIX)
    if own in TITLES:
        return TITLES[own]
    base = own.removesuffix(EVERY_LINEAR)
    return f"{TITLES[base]}, every linear" if base in TITLES else own


def choices() -> list[tuple[str, str]]:
    """The tools that are installed, for a dropdown, as a group of their own behind the methods."""
    found = (PREFIX + name for name, peer in PEERS.items() if missing(peer) is None)
    return [(f"{GROUP}: {title_of_peer(name)}", name) for name in found]


def absent() -> list[tuple[str, str]]:
    """The tools that are not installed: title, and the sentence with the line that brings them."""
    found = ((name, missing(peer)) for name, peer in PEERS.items())
    return [(title_of_peer(name), why) for name, why in found if why is not None]


def recipe_of(name: str) -> Recipe:
    """The recipe that hands the model to an installed tool; RecipeError if there is no such tool or it is not installed."""
    own = name.removeprefix(PREFIX)
    if (why := missing(find_peer(own))) is not None:
        raise RecipeError(f"baseline: {why}, or choose another baseline.")
    return peer_recipe(own)


def description_of(name: str) -> str:
    """What a tool does, in a sentence; empty for no tool."""
    peer = PEERS.get(name.removeprefix(PREFIX))
    return peer.description if peer is not None else ""


def version_of(facts: Mapping[str, Any]) -> str:
    """ "openvino 2026.4.1, nncf 3.4.0": what ran, from a row; empty where it does not say."""
    told = facts.get("peer")
    return str(told.get("versions") or "") if isinstance(told, Mapping) else ""
