"""Attention with quantized operands against plain arithmetic: grids, masks, cross-attention, batches, blocks of rows."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from trdq_core import branches
from trdq_core.errors import CalibrationError, RecipeError
from trdq_core.nn import quantized_attention as module
from trdq_core.nn.attention import Map
from trdq_core.nn.input_grid import InputGrid
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.quantized_attention import (
    AttentionGrids,
    ObservedAttention,
    QuantizedAttention,
    check_products,
    quantize_heads,
    quantize_map,
    quantized_products,
)
from trdq_core.presets import make_recipe
from trdq_core.timegroups import TimeContext, TimeGroups
from trdq_core.transforms.base import InputTransform
from trdq_core.weights.rounding import quantize_weight

TOKENS, CHANNELS, HEADS = 24, 64, 2


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def make(bits: int = 8, softmax_bits: int = 8, thresholds: tuple[float, ...] = ()) -> tuple[Attention, torch.Tensor]:
    """An attention with quantized products, and some input (items, tokens, channels)."""
    torch.manual_seed(0)
    attention = Attention(query_dim=CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS, processor=AttnProcessor2_0())
    attention.to_q.weight.mul_(4)
    x = torch.randn(4, TOKENS, CHANNELS)
    scales = [
        heads(attention, name, x).abs().amax((0, 2, 3)) / (2 ** (bits - 1) - 1) for name in ("to_q", "to_k", "to_v")
    ]
    grids = AttentionGrids(
        *scales, bits, softmax_bits, thresholds, TimeGroups((500.0,)) if thresholds else TimeGroups()
    )
    attention.set_processor(QuantizedAttention(grids, TimeContext(TimeGroups())))
    return attention, x


def heads(attention: Attention, name: str, x: torch.Tensor) -> torch.Tensor:
    return getattr(attention, name)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def expected(
    attention: Attention, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None, threshold: float | None
) -> torch.Tensor:
    """The definition, spelled out per head."""
    grids = attention.processor.grids
    out = []
    for head in range(HEADS):
        q, k, v = (
            (heads(attention, name, source)[:, head] / scale[head]).round().clamp(-127, 127) * scale[head]
            for name, source, scale in (
                ("to_q", x, grids.q_scale),
                ("to_k", context, grids.k_scale),
                ("to_v", context, grids.v_scale),
            )
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(CHANNELS // HEADS)
        if mask is not None:
            scores = scores + mask
        out.append(quantize_map(scores.softmax(-1), grids.softmax_bits, threshold) @ v)
    return attention.to_out[0](torch.cat(out, -1))


@pytest.mark.parametrize("thresholds", [(), (2.0**-4, 2.0**-7)])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_products_are_those_of_the_quantized_operands(thresholds: tuple[float, ...], cross: bool, masked: bool) -> None:
    attention, x = make(thresholds=thresholds)
    context = torch.randn(4, 7, CHANNELS) if cross else x
    mask = None
    if masked:
        mask = torch.zeros(4, 1, context.shape[1])
        mask[:, :, -3:] = -10000.0
    for timestep, threshold in ((100.0, 0), (900.0, 1)):
        attention.processor.time.set(timestep)
        y = attention(x, context if cross else None, attention_mask=mask)
        level = thresholds[threshold] if thresholds else None
        assert torch.allclose(y, expected(attention, x, context, mask, level), atol=1e-5)
    assert attention.processor.calls == 2


def test_hidden_tokens_stay_exactly_zero_in_the_map() -> None:
    attention, x = make(thresholds=(2.0**-19, 2.0**-19))
    mask = torch.zeros(4, 1, TOKENS)
    mask[:, :, -5:] = -10000.0
    changed = x.clone()
    changed[:, -5:] = 1e3 * torch.randn(4, 5, CHANNELS)
    text, other = x, changed
    assert torch.equal(attention(x, text, attention_mask=mask), attention(x, other, attention_mask=mask))
    probabilities = (torch.randn(3, 9) + torch.tensor([0.0] * 6 + [-10000.0] * 3)).softmax(-1)
    for threshold in (None, 1.0, 2.0**-10):
        assert (quantize_map(probabilities, 8, threshold)[:, 6:] == 0).all()


@pytest.mark.parametrize("thresholds", [(), (2.0**-5, 2.0**-5)])
def test_invariant_23_an_item_does_not_depend_on_its_batch(thresholds: tuple[float, ...]) -> None:
    attention, x = make(thresholds=thresholds)
    x[2] *= 3  # an item of another size would move any grid taken from the live batch
    together = attention(x)
    alone = torch.cat([attention(item[None]) for item in x])
    assert torch.allclose(together, alone, atol=1e-5)
    with branches.joint():
        assert torch.equal(attention(x), together), "branches make no difference"
    with branches.single():
        assert torch.equal(attention(x), together)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = make(thresholds=(2.0**-5, 2.0**-5))
    mask = torch.randn(4, TOKENS, TOKENS)
    whole = attention(x, attention_mask=mask)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 4 * HEADS * TOKENS * 5)  # five rows at a time
    assert torch.allclose(attention(x, attention_mask=mask), whole, atol=1e-6)


def test_more_bits_come_nearer_to_plain_attention() -> None:
    errors = []
    for bits in (4, 6, 8):
        attention, x = make(bits, bits)
        plain = AttnProcessor2_0()(attention, x)
        errors.append(float((attention(x) - plain).norm() / plain.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_half_precision_keeps_its_dtype_and_stays_finite() -> None:
    attention, x = make(thresholds=(2.0**-5, 2.0**-5))
    exact = attention(x)
    y = attention.half()(x.half())
    assert y.dtype is torch.float16
    assert float((y.float() - exact).norm() / exact.norm()) < 0.02
    zero = quantized_products(Map(x[:, None], x[:, None] * 0, None), x[:, None] * 0, single_head(), None)
    assert torch.equal(zero, torch.zeros_like(zero))


def single_head() -> AttentionGrids:
    return AttentionGrids(torch.ones(1), torch.full((1,), 1e-12), torch.full((1,), 1e-12), 8, 8)


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_a_row_that_sees_nothing_is_zero(threshold: float | None) -> None:
    x = torch.randn(1, 1, 5, 4)
    mask = torch.zeros(1, 1, 5, 5)
    mask[:, :, 2] = -torch.inf
    out = quantized_products(Map(x, x, mask), x, single_head(), threshold)
    assert torch.isfinite(out).all()
    assert not out[:, 2].any()
    assert out[:, :2].any()


def test_quantized_linears_feed_quantized_products() -> None:
    attention, x = make()
    plain = attention(x)
    rule = make_recipe("rtn").rules[0]
    time = TimeContext(TimeGroups())
    quantizer = InputQuantizer([InputTransform()], InputGrid(rule.activation), time=time, backend="torch", readers=3)
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        linear = getattr(attention, name)
        weights = [quantize_weight(linear.weight, rule.weight)]
        setattr(attention, name, QuantizedLinear(weights, linear.bias, quantizer, owns_input=index == 0))
    y = attention(x)
    assert 0 < float((y - plain).norm() / plain.norm()) < 0.05


def test_each_head_has_a_scale_of_its_own() -> None:
    x = torch.randn(2, 3, 5, 4)
    scale = torch.tensor([0.1, 0.5, 2.0])
    together = quantize_heads(x, scale, 4)
    for head in range(3):
        assert torch.equal(together[:, head], (x[:, head] / scale[head]).round().clamp(-7, 7) * scale[head])


def test_watching_gives_the_plain_output_and_shows_the_operands() -> None:
    attention, x = make()
    seen: list[tuple[Map, torch.Tensor]] = []
    watched = ObservedAttention(AttnProcessor2_0(), lambda source, values: seen.append((source, values)))
    attention.set_processor(watched)
    text, mask = torch.randn(4, 7, CHANNELS), torch.zeros(4, 1, 7)
    assert torch.equal(attention(x, text, attention_mask=mask), AttnProcessor2_0()(attention, x, text, mask))
    source, values = seen[0]
    assert torch.equal(source.q, heads(attention, "to_q", x)) and torch.equal(source.k, heads(attention, "to_k", text))
    assert torch.equal(values, heads(attention, "to_v", text)) and source.mask.shape == (4, HEADS, 1, 7)


def test_attention_of_another_kind_and_wrong_grids_are_refused() -> None:
    attention = Attention(query_dim=CHANNELS, heads=HEADS, dim_head=32, residual_connection=True)
    with pytest.raises(RecipeError, match=r"block 3: .* cannot be quantized"):
        check_products("block 3", attention)
    with pytest.raises(CalibrationError, match="2 softmax thresholds for 1 time groups"):
        AttentionGrids(*[torch.ones(2)] * 3, 8, 8, (0.5, 0.25))
