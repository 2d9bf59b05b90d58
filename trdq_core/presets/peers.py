"""Other tools a person could pick instead, by the names that stand in place of a recipe. Data alone: nothing is imported."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

from trdq_core.errors import RecipeError
from trdq_core.presets.methods import QUANTIZED_ROLES
from trdq_core.specs import LayerRule, QuantSpec, Recipe

PREFIX = "peer-"
EVERY_LINEAR = "-all"  # behind a peer's name: every linear, which is what the tools do when nobody says otherwise

# Packages by the name they are imported by, and what pip calls them; requirements-peers.txt holds the same lines.
REQUIREMENTS: Mapping[str, str] = {
    "torchao": "torchao>=0.18,<0.19",
    "sdnq": "sdnq>=0.2.8,<0.3",
    "optimum.quanto": "optimum-quanto>=0.2.7,<0.3",
    "bitsandbytes": "bitsandbytes>=0.50,<0.51",
    "openvino": "openvino>=2026.4,<2027",
    "nncf": "nncf>=3.4,<4",
}


class Peer(NamedTuple):
    """One way of using another tool: what it is, the packages it needs, the bits it gives the layers its rules name."""

    name: str
    tool: str  # its module in trdq_core.peers
    description: str
    packages: tuple[str, ...] = ()
    weight_bits: int | None = None
    activation_bits: int | None = None  # None: activations stay in floating point
    static: bool = False  # activation ranges are fixed by a calibration


_ALL = (
    Peer("torch-compile", "torch_compile", "The reference itself under torch.compile: nothing is quantized."),
    Peer("torchao-int8", "torchao", "torchao, int8 weights and activations per token at run time.", ("torchao",), 8, 8),
    Peer("torchao-int8-compile", "torchao", "torchao as above, under torch.compile.", ("torchao",), 8, 8),
    Peer("sdnq-int8", "sdnq", "SDNQ, int8 weights, activations per token at run time.", ("sdnq",), 8, 8),
    Peer("sdnq-int8-hadamard", "sdnq", "SDNQ as above, behind its Hadamard rotation.", ("sdnq",), 8, 8),
    Peer("quanto-int8", "quanto", "optimum-quanto, int8 with static activations.", ("optimum.quanto",), 8, 8, True),
    Peer("quanto-int8-weights", "quanto", "optimum-quanto, int8 weights alone.", ("optimum.quanto",), 8),
    Peer("bitsandbytes-int8", "bitsandbytes", "LLM.int8(): outlier channels stay in floating point.", ("bitsandbytes",), 8, 8),
    Peer("openvino-fp32", "openvino", "OpenVINO, nothing quantized, all in FP32.", ("openvino",)),
    Peer("openvino-bf16", "openvino", "OpenVINO, nothing quantized, in bfloat16, its default where the chip has it.",
         ("openvino",)),
    Peer("openvino-int8-weights", "openvino", "OpenVINO, int8 weights, activations quantized in groups at run time.",
         ("openvino", "nncf"), 8, 8),
    Peer("openvino-int8", "openvino", "OpenVINO and NNCF, static INT8; the rest in the type OpenVINO picks for the chip.",
         ("openvino", "nncf"), 8, 8, True),
    Peer("openvino-int8-fp32", "openvino", "OpenVINO and NNCF, static INT8; the rest in FP32.", ("openvino", "nncf"), 8, 8, True),
)  # fmt: skip
PEERS: Mapping[str, Peer] = {peer.name: peer for peer in _ALL}


def find_peer(name: str) -> Peer:
    """The peer called `name`, with or without the ending for every linear; RecipeError if there is none."""
    found = PEERS.get(name) or PEERS.get(name.removesuffix(EVERY_LINEAR))
    if found is None:
        close = difflib.get_close_matches(name, PEERS, n=1)
        hint = f"; did you mean {PREFIX}{close[0]}?" if close else "."
        raise RecipeError(f"recipe: got {PREFIX}{name}; known peers are {', '.join(PEERS)}{hint}")
    return found


def peer_recipe(name: str) -> Recipe:
    """The recipe that hands the model to another tool. It quantizes the linears inside blocks, as recipes here do.

    With "-all" behind the name it quantizes every linear. RecipeError for a tool that quantizes none.
    """
    peer = find_peer(name)
    every = name != peer.name
    rules: tuple[LayerRule, ...] = ()
    if peer.weight_bits is not None:
        activation = None
        if peer.activation_bits is not None:
            dynamic = not peer.static
            activation = QuantSpec(
                bits=peer.activation_bits, dynamic=dynamic, granularity="token" if dynamic else "tensor"
            )
        rules = (
            LayerRule(
                roles=() if every else QUANTIZED_ROLES,
                weight=QuantSpec(bits=peer.weight_bits, granularity="channel"),
                activation=activation,
            ),
        )
    elif every:
        raise RecipeError(f"recipe: got {PREFIX}{name}; {peer.name} quantizes nothing, leave {EVERY_LINEAR} out.")
    words = " Every linear, not only those inside blocks." if every else ""
    return Recipe(name=f"{PREFIX}{name}", rules=rules, description=peer.description + words, peer=name)


def missing(peer: Peer) -> str | None:
    """What is not installed and the line that brings it, None if the peer can be used."""
    absent = [package for package in peer.packages if not _installed(package)]
    if not absent:
        return None
    line = " ".join(f'"{REQUIREMENTS[package]}"' for package in absent)
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {verb} not installed; pip install {line}"


def _installed(package: str) -> bool:
    """Whether `import package` would find something. Its parents are imported for that, as find_spec has it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a parent is not there, or a module without a spec stands in its place
        return False
