"""Which linears are learned together."""

from __future__ import annotations

from trdq_core.plan import LayerInfo
from trdq_core.reconstruction.units import Unit, find_blocks, plan_units


def layers(*names_and_roles: tuple[str, str]) -> list[LayerInfo]:
    return [LayerInfo(name, role, name, 8, 8) for name, role in names_and_roles]


def test_blocks_are_what_is_numbered_around_the_queries() -> None:
    found = find_blocks(
        layers(
            ("embed.linear_1", "embed"),
            ("stages.0.blocks.0.attn1.to_q", "self_q"),
            ("stages.0.blocks.0.attn1.to_out.0", "self_out"),
            ("stages.0.blocks.1.attn1.to_q", "self_q"),
            ("proj_out", "final"),
        )
    )
    assert found == ("stages.0.blocks.0", "stages.0.blocks.1")


def test_every_linear_is_in_one_unit_and_temporal_ones_come_first() -> None:
    blocks = ("blocks.1", "blocks.10")
    learned = ["time.a", "blocks.1.q", "blocks.1.k", "blocks.10.q", "final"]
    temporal = (Unit("temporal", "time", ("time.a",)),)
    by_block = plan_units(learned, blocks, temporal, "block")
    assert by_block == (
        *temporal,
        Unit("block", "blocks.1", ("blocks.1.q", "blocks.1.k")),
        Unit("block", "blocks.10", ("blocks.10.q",)),
        Unit("layer", "final", ("final",)),
    )
    by_layer = plan_units(learned, blocks, (), "layer")
    assert [unit.layers for unit in by_layer] == [(name,) for name in learned]
    assert by_layer[3].block == "blocks.10" and by_layer[4].block is None
