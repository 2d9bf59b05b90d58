"""Roles and shared inputs."""

from __future__ import annotations

import pytest

from trdq_core.adapters import layers_of
from trdq_core.adapters.roles import role_of


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("transformer_blocks.0.attn1.to_q", "self_q"),
        ("transformer_blocks.11.attn2.to_out.0", "cross_out"),
        ("transformer_blocks.3.ff.net.0.proj", "mlp_in"),
        ("transformer_blocks.3.ff.net.2", "mlp_out"),
        ("temporal_transformer_blocks.0.attn1.to_q", "temporal_q"),
        ("temporal_transformer_blocks.7.attn1.to_k", "temporal_k"),
        ("temporal_transformer_blocks.7.attn1.to_v", "temporal_v"),
        ("temporal_transformer_blocks.7.attn1.to_out.0", "temporal_out"),
        ("temporal_transformer_blocks.3.ff.net.0.proj", "temporal_mlp_in"),
        ("temporal_transformer_blocks.3.ff.net.2", "temporal_mlp_out"),
        ("adaln_single.linear", "modulation"),
        ("transformer_blocks.3.norm1.linear", "modulation"),
        ("adaln_single.emb.timestep_embedder.linear_1", "embed"),
        ("caption_projection.linear_1", "embed"),
        ("proj_out", "final"),
        ("something.unseen", "other"),
    ],
)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role


def test_queries_keys_and_values_of_one_input_share_a_leader() -> None:
    layers = {layer.name: layer for layer in layers_of("random-dit", None)}
    for part in ("to_k", "to_v"):
        assert layers[f"transformer_blocks.2.attn1.{part}"].leader == "transformer_blocks.2.attn1.to_q"
    assert layers["transformer_blocks.2.ff.net.2"].leader == "transformer_blocks.2.ff.net.2"
    assert "other" not in {layer.role for layer in layers.values()}
