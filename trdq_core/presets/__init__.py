"""The published methods, and ours, as recipes."""

from trdq_core.presets.methods import ALIASES, METHODS, QUANTIZED_ROLES, Method
from trdq_core.presets.peers import PEERS, Peer, find_peer, missing, peer_recipe
from trdq_core.presets.recipes import OFFERED_BITS, make_recipe, parse_recipe, published_sharing, with_sharing

__all__ = [
    "ALIASES", "METHODS", "OFFERED_BITS", "PEERS", "QUANTIZED_ROLES", "Method", "Peer", "find_peer", "make_recipe", "missing",
    "parse_recipe", "peer_recipe", "published_sharing", "with_sharing",
]  # fmt: skip
