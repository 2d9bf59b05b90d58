"""Fused blocks: what the stock blocks compute, whatever is around them, and left alone where they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from tests.tiny import tiny_pipeline, tiny_video_pipeline
from trdq_core import branches
from trdq_core.adapters.roles import find_linears
from trdq_core.kernels import native
from trdq_core.nn.fused import FusedAttention, unfused
from trdq_core.nn.fused_block import fuse
from trdq_core.nn.input_grid import InputGrid
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.modules import replace_module, share_copy
from trdq_core.plan import group_inputs
from trdq_core.presets import make_recipe
from trdq_core.sharing import apply_sharing
from trdq_core.specs import SharingSpec
from trdq_core.timegroups import TimeContext, TimeGroups
from trdq_core.transforms.fit import fit_transform
from trdq_core.weights.rounding import quantize_weight


@pytest.fixture(autouse=True)
def _native() -> None:
    reason = native.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)


def quantized(denoiser: nn.Module, backend: str = "cpp", low_rank: bool = False) -> nn.Module:
    """The denoiser with the linears that a recipe quantizes replaced, smoothed by the sizes of random rows."""
    denoiser, time = share_copy(denoiser.eval().requires_grad_(False)), TimeContext(TimeGroups())
    for group in group_inputs(find_linears(denoiser), make_recipe("smoothquant")):
        originals = [denoiser.get_submodule(layer.name) for layer in group.layers]
        width = originals[0].in_features
        rows = torch.randn(32, width) * torch.linspace(0.5, 4, width)
        transform = fit_transform(
            group.rule.transforms, rows=rows, absmax=rows.abs().amax(0), weights=[o.weight for o in originals], seed=0
        )
        down = [torch.zeros(2, width)] if low_rank else []
        quantizer = InputQuantizer(
            [transform], InputGrid(group.rule.activation), time=time, backend=backend, readers=len(originals),
            low_rank_down=down,
        )  # fmt: skip
        for index, (layer, original) in enumerate(zip(group.layers, originals, strict=True)):
            weight = quantize_weight(transform.apply_to_weight(original.weight), group.rule.weight)
            up = [torch.zeros(original.out_features, 2)] if low_rank else []
            new = QuantizedLinear([weight], original.bias, quantizer, owns_input=index == 0, low_rank_up=up)
            replace_module(denoiser, layer.name, new)
    return denoiser


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2, sample_size=6,
        patch_size=2, num_embeds_ada_norm=10, norm_elementwise_affine=False,
    )  # fmt: skip
    call = {"hidden_states": torch.randn(2, 4, 6, 6), "timestep": torch.tensor([500, 500])}
    return model, {**call, "class_labels": torch.tensor([10, 3])}


def pixart() -> tuple[nn.Module, dict[str, Tensor]]:
    mask = torch.ones(2, 5)
    mask[0, 3:] = 0  # the empty prompt is shorter
    call = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500, 500])}
    return tiny_pipeline().transformer, {
        **call, "encoder_hidden_states": torch.randn(2, 5, 32), "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def latte() -> tuple[nn.Module, dict[str, Tensor]]:
    call = {"hidden_states": torch.randn(2, 4, 4, 8, 8), "timestep": torch.tensor([500, 500])}
    return tiny_video_pipeline().transformer, {**call, "encoder_hidden_states": torch.randn(2, 5, 32)}


MODELS = {"dit": dit, "pixart": pixart, "latte": latte}


def output(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def off(actual: Tensor, expected: Tensor) -> float:
    """Relative error: rounding of float32 moves a few activations by one level."""
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_fused_blocks_compute_what_stock_blocks_do(name: str) -> None:
    """All blocks, with the cross-attention's mask where there is one; weights and buffers keep their names and places."""
    model, call = MODELS[name]()
    plain = quantized(model)
    fused = share_copy(plain)
    blocks = {"dit": 2, "pixart": 2, "latte": 4}[name]
    count = fuse(fused)
    attentions = {"dit": 2, "pixart": 4, "latte": 6}[name]
    assert count == {"attentions": attentions, "feed_forwards": blocks, "blocks": blocks}
    expected = output(plain, call)
    assert off(output(fused, call), expected) < 2e-3
    before, after = plain.state_dict(keep_vars=True), fused.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before)


def test_a_fused_step_calls_no_separate_norm_or_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to be fused is not also computed by torch."""
    model, call = dit()
    fused = quantized(model)
    fuse(fused)
    seen: list[str] = []
    for name in ("gelu", "scaled_dot_product_attention"):
        original = getattr(nn.functional, name)
        monkeypatch.setattr(
            nn.functional, name, lambda *a, _f=original, _n=name, **k: (seen.append(_n), _f(*a, **k))[1]
        )
    output(fused, call)
    assert not seen
    output(quantized(model), call)
    assert set(seen) == {"gelu", "scaled_dot_product_attention"}


def test_what_cannot_be_fused_is_left_alone() -> None:
    """Another backend, a low-rank branch, another activation."""
    model, _ = pixart()
    assert not any(fuse(quantized(model, backend="torch")).values())
    assert not any(fuse(quantized(model, low_rank=True)).values())
    assert not any(fuse(share_copy(model)).values())
    other = quantized(model)
    other.transformer_blocks[0].ff.net[0].approximate = "none"
    assert fuse(other) == {"attentions": 4, "feed_forwards": 1, "blocks": 2}


def test_a_block_with_one_unfused_part_still_computes_the_same() -> None:
    """The norm and the residual of a part that is not fused come from torch."""
    model, call = pixart()
    plain, fused = quantized(model), quantized(model)
    for part in (plain, fused):
        part.transformer_blocks[0].ff.net[0].approximate = "none"
    fuse(fused)
    fused.transformer_blocks[1].attn1.set_processor(fused.transformer_blocks[1].attn1.processor.plain)
    assert off(output(fused, call), output(plain, call)) < 2e-3


def test_shared_attention_stands_on_fused_attention() -> None:
    """Sharing accepts the fused processor, keeps it for what it does not share, and changes the result as it does unfused."""
    model, call = pixart()
    spec = SharingSpec(blocks=((0,),))
    outputs = []
    for fusing in (False, True):
        denoiser, time = quantized(model), TimeContext(TimeGroups())
        if fusing:
            fuse(denoiser)
        sharing = apply_sharing(denoiser, find_linears(model), spec, time)
        with branches.joint():
            outputs.append(output(denoiser, call))
        assert sharing.processors[0].shared_calls == 1
    assert isinstance(sharing.processors[0].plain, FusedAttention)
    assert off(outputs[1], outputs[0]) < 2e-3


@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x.clone().requires_grad_()],
    ids=["float64", "bfloat16", "grad"],
)
def test_other_calls_go_to_what_was_there(change: Callable[[Tensor], Tensor]) -> None:
    """Gradients and types that the kernels do not read are torch's affair."""
    seen: list[str] = []
    fused = quantized(dit()[0])
    fuse(fused)
    block = fused.transformer_blocks[0]
    for stand_in in (block.forward, block.ff.forward, block.attn1.processor):
        stand_in.plain = lambda *args, **kwargs: seen.append("plain")
    x = change(torch.zeros(1, 2, 48))
    block.forward(x)
    block.ff.forward(x)
    block.attn1.processor(block.attn1, x)
    assert seen == ["plain"] * 3


def test_compiled_graphs_hold_the_stock_blocks() -> None:
    """torch.compile fuses by itself; the forwards of our own step aside and break no graph."""
    model, call = dit()
    fused = quantized(model)
    fuse(fused)
    expected = output(fused, call)
    with torch.no_grad():
        compiled = torch.compile(fused.transformer_blocks[0], backend="aot_eager")
        x, timestep, labels = torch.randn(2, 9, 48), call["timestep"], call["class_labels"]
        ours = fused.transformer_blocks[0](x, timestep=timestep, class_labels=labels)
        assert off(compiled(x, timestep=timestep, class_labels=labels), ours) < 2e-3
    torch.compiler.reset()
    assert torch.equal(output(fused, call), expected)


def test_unfused_is_the_stock_block_to_the_bit() -> None:
    """What torch.compile traces and what a fused step is compared with."""
    model, call = dit()
    plain = quantized(model)
    fused = share_copy(plain)
    fuse(fused)
    expected = output(plain, call)
    with unfused():
        assert torch.equal(output(fused, call), expected)
    assert not torch.equal(output(fused, call), expected)


def test_hooks_on_linears_are_never_bypassed() -> None:
    """Whoever watches a layer, or brings its weights, sees each of its calls."""
    model, call = pixart()
    fused = quantized(model)
    fuse(fused)
    seen: list[str] = []
    for name in ("attn1.to_k", "attn2.to_q", "ff.net.2"):
        linear = fused.transformer_blocks[0].get_submodule(name)
        linear.register_forward_hook(lambda module, args, result, name=name: seen.append(name))
    output(fused, call)
    assert seen == ["attn1.to_k", "attn2.to_q", "ff.net.2"]
