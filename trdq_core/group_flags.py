"""Flags that say how the time axis is cut and where several sets of weights live, for the commands that name recipes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from trdq_core.errors import RecipeError
from trdq_core.sharing_flags import parse_edges
from trdq_core.specs import STORAGE_MODES, TIME_GROUP_KINDS


def add_group_flags(parser: argparse.ArgumentParser) -> None:
    """Time groups and storage of methods that use time."""
    add = parser.add_argument
    add("--groups", type=int, metavar="K", help="timestep groups of methods that use time (default 1)")
    add(
        "--group-kind",
        choices=TIME_GROUP_KINDS,
        help="how time is cut (default uniform; edges where --edges is given)",
    )
    add(
        "--edges",
        metavar="T,T",
        help="timesteps between 0 and 1000 at which time is cut, such as 250,500,750",
    )
    add("--storage", choices=STORAGE_MODES, help="where the weights of several groups live (default switched)")


def grouping_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """What --groups, --group-kind, --edges and --storage say, as `parse_recipe` takes it."""
    edges = parse_edges(given["edges"]) if "edges" in given else ()
    groups = given.get("groups", len(edges) + 1)
    if edges and groups != len(edges) + 1:
        raise RecipeError(
            f"--groups: got {groups} with {len(edges)} edges, which make {len(edges) + 1}; leave --groups out."
        )
    kind = given.get("group_kind", "edges" if edges else "uniform")
    if edges and kind != "edges":
        raise RecipeError(f"--edges: got edges with --group-kind {kind}; leave --group-kind out, or say edges.")
    return {"groups": groups, "group_kind": kind, "edges": edges, "storage": given.get("storage")}


def keep_groups(given: Mapping[str, Any], of: str, instead: str) -> None:
    """RecipeError where flags ask for time groups of recipes that a file holds, which keep their own."""
    if asked := sorted({"groups", "group_kind", "edges", "storage"} & set(given)):
        word = "--" + asked[0].replace("_", "-")
        raise RecipeError(f"{word}: the recipes of {of} keep their own groups; {instead}.")
