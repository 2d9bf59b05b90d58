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
        ("transformer_blocks.0.attn.to_q", "self_q"),
        ("transformer_blocks.0.attn.add_q_proj", "text_q"),
        ("transformer_blocks.0.attn.to_add_out", "text_out"),
        ("transformer_blocks.0.ff_context.net.0.proj", "text_mlp_in"),
        ("transformer_blocks.0.txt_mlp.net.2", "text_mlp_out"),
        ("transformer_blocks.0.img_mod.1", "modulation"),
        ("single_transformer_blocks.7.proj_mlp", "mlp_in"),
        ("single_transformer_blocks.7.proj_out", "fused_out"),
        ("single_transformer_blocks.7.attn.to_qkv_mlp_proj", "fused_in"),
        ("blocks.3.attn2.add_k_proj", "cross_k"),
        ("blocks.3.ffn.net.0.proj", "mlp_in"),
        ("blocks.3.skip_linear", "skip"),
        ("context_refiner.0.feed_forward.linear_1", "text_mlp_in"),
        ("layers.11.feed_forward.w2", "mlp_out"),
        ("layers.11.adaLN_modulation.0", "modulation"),
        ("norm_out.linear_2", "final"),
        ("all_final_layer.2-1.linear", "final"),
        ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q", "embed"),
        ("condition_embedder.time_proj", "embed"),
        ("something.unseen", "other"),
        ("blocks.2.router", "other"),
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
