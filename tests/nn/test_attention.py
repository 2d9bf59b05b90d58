"""Shared self-attention against plain arithmetic: joint batches, two calls, masks, the store, operations, quantized linears."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

from trdq_core import branches
from trdq_core.errors import RecipeError, ShapeError
from trdq_core.kernels import dispatch
from trdq_core.nn import attention as module
from trdq_core.nn.attention import Map, SharedAttention, attend, check_attention, map_blocks, score_rows
from trdq_core.nn.input_grid import InputGrid
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.presets import make_recipe
from trdq_core.timegroups import TimeContext, TimeGroups
from trdq_core.transforms.fit import fit_transform
from trdq_core.weights.rounding import quantize_weight

TOKENS, CHANNELS, HEADS = 40, 128, 2


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def make(active: frozenset[int] = frozenset({0})) -> tuple[Attention, SharedAttention]:
    torch.manual_seed(0)
    attention = Attention(query_dim=CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS, processor=AttnProcessor2_0())
    attention.to_q.weight.mul_(4)  # maps that are far from uniform
    shared = SharedAttention(attention.processor, TimeGroups(), active, TimeContext(TimeGroups()))
    attention.set_processor(shared)
    return attention, shared


def inputs(prompts: int = 1, same: bool = False) -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(2 * prompts, TOKENS, CHANNELS)
    if same:
        x[:prompts] = x[prompts:]
    return x


def expected(attention: Attention, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A_c V for both halves, spelled out."""
    half = len(x) // 2
    q, k, v = (
        f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (attention.to_q, attention.to_k, attention.to_v)
    )
    scores = q[half:] @ k[half:].transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask[half:, None]
    maps = scores.softmax(-1)
    return attention.to_out[0](torch.cat([maps @ v[:half], maps @ v[half:]]).transpose(1, 2).flatten(2))


def key_mask(prompts: int) -> torch.Tensor:
    """An additive mask (items, 1, tokens) that hides the last tokens, others for every prompt."""
    mask = torch.zeros(2 * prompts, 1, TOKENS)
    for item in range(2 * prompts):
        mask[item, :, TOKENS - 5 - item % prompts :] = -10000.0
    return mask


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_invariant_35_one_batch_gives_the_conditional_map_to_both(prompts: int, masked: bool) -> None:
    attention, shared = make()
    x, mask = inputs(prompts), key_mask(prompts) if masked else None
    plain = attention(x, attention_mask=mask)
    with branches.joint():
        y = attention(x, attention_mask=mask)
    assert torch.allclose(y, expected(attention, x, mask), atol=1e-5)
    assert torch.allclose(y[prompts:], plain[prompts:], atol=1e-5), "the conditional half is never changed"
    assert not torch.allclose(y[:prompts], plain[:prompts], atol=1e-3)
    assert (shared.shared_calls, shared.plain_calls) == (1, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_invariant_35_equal_branches_give_equal_outputs(masked: bool) -> None:
    attention, _ = make()
    x, mask = inputs(2, same=True), key_mask(2) if masked else None
    plain = attention(x, attention_mask=mask)
    with branches.joint():
        assert torch.allclose(attention(x, attention_mask=mask), plain, atol=1e-6)
    with branches.two_calls() as step:
        halves = {"conditional": slice(2, None), "unconditional": slice(None, 2)}
        for branch, rows in halves.items():
            with step.call(branch):
                y = attention(x[rows], attention_mask=None if mask is None else mask[rows])
                assert torch.allclose(y, plain[rows], atol=1e-6)


def test_invariant_35_nothing_active_is_a_bit_equal_no_op() -> None:
    attention, shared = make(frozenset())
    x = inputs(2)
    plain = shared.plain(attention, x)
    with branches.joint():
        assert torch.equal(attention(x), plain)
    attention, shared = make()
    assert torch.equal(attention(x), plain), "where nobody names the branches nothing is shared"
    with branches.single():
        assert torch.equal(attention(x), plain), "guidance 1 with two prompts has no unconditional half"
    with branches.joint():
        text = torch.randn(4, 7, CHANNELS)
        assert torch.equal(attention(x, text), shared.plain(attention, x, text)), "cross-attention is never shared"
    assert shared.shared_calls == 0


def test_halves_with_different_masks_are_not_shared() -> None:
    attention, shared = make()
    x, mask = inputs(), key_mask(1)
    mask[0, :, :9] = -10000.0
    with branches.joint():
        assert torch.equal(attention(x, attention_mask=mask), shared.plain(attention, x, attention_mask=mask))
    assert shared.shared_calls == 0


def test_odd_batches_are_refused_in_words() -> None:
    attention, _ = make()
    with branches.joint(), pytest.raises(ShapeError, match="got a batch of 3; .* it must be even"):
        attention(torch.randn(3, TOKENS, CHANNELS))


@pytest.mark.parametrize("prompts", [1, 2])
def test_invariant_35_two_calls_share_through_a_store_that_is_emptied(prompts: int) -> None:
    attention, shared = make()
    x = inputs(prompts)
    with branches.joint():
        together = attention(x)
    with branches.two_calls() as step:
        with step.call("conditional"):
            conditional = attention(x[prompts:])
        assert step.kept
        with step.call("unconditional"):
            unconditional = attention(x[:prompts])
    assert torch.equal(conditional, shared.plain(attention, x[prompts:]))
    assert torch.allclose(torch.cat([unconditional, conditional]), together, atol=1e-6)
    assert not step.kept


def test_invariant_35_unconditional_first_recomputes_and_keeps_nothing() -> None:
    attention, shared = make()
    x = inputs()
    with branches.two_calls() as step:
        with step.call("unconditional"):
            assert torch.equal(attention(x[:1]), shared.plain(attention, x[:1]))
        with step.call("conditional"):
            assert torch.equal(attention(x[1:]), shared.plain(attention, x[1:]))
        assert not any(isinstance(kept, tuple) for kept in step.kept.values())
    assert shared.shared_calls == 0
    assert not step.kept


def test_invariant_35_a_map_of_another_timestep_or_size_is_not_used() -> None:
    attention, shared = make()
    x = inputs(2)
    for change in ("timestep", "size"):
        with branches.two_calls() as step:
            with step.call("conditional"):
                attention(x[2:])
            shared.time.timestep += 1.0 if change == "timestep" else 0.0
            rows = x[:2] if change == "timestep" else x[:1]
            with step.call("unconditional"):
                assert torch.equal(attention(rows), shared.plain(attention, rows))
    assert shared.shared_calls == 0


@pytest.mark.parametrize("inside", [True, False])
def test_invariant_35_the_store_is_empty_after_an_exception_or_a_cancel(inside: bool) -> None:
    attention, _ = make()
    with pytest.raises(RuntimeError, match="stop"), branches.two_calls() as step:
        with step.call("conditional"):
            attention(inputs()[1:])
            if inside:
                raise RuntimeError("stop")
        assert step.kept
        raise RuntimeError("stop")
    assert not step.kept
    assert branches.present().branch == "single"


def test_invariant_35_the_error_stays_within_its_bound() -> None:
    """What sharing changes in each head and row: at most the row sum of |A_c - A_u| times the longest value."""
    attention, shared = make()
    attention.to_out[0].weight.copy_(torch.eye(CHANNELS))
    attention.to_out[0].bias.zero_()
    x = inputs()
    plain = shared.plain(attention, x)
    with branches.joint():
        got = attention(x)
    assert shared.shared_calls == 1
    q, k, v = (
        f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (attention.to_q, attention.to_k, attention.to_v)
    )
    maps = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    error = (got - plain)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1).norm(dim=-1)  # (heads, tokens)
    bound = (maps[1] - maps[0]).abs().sum(-1) * v[0].norm(dim=-1).amax(-1, keepdim=True)
    assert error.amin() > 0
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.amax() > 0.05 * bound.amax(), "the bound is one of this error, not of anything larger"


@pytest.mark.parametrize("budget", [1 << 10, 1 << 20])
def test_row_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(module, "SCORE_BYTES", budget)
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 37, 16)
    values = torch.randn(2, 3, 37, 48)
    maps = torch.zeros(2, 3, 37, 37)
    for item, head, part, block in map_blocks(Map(q, k, None)):
        assert len(block) <= score_rows(37, 37)
        maps[item, head, part] += block
    reference = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    assert torch.allclose(maps, reference, atol=1e-6)
    expected = (reference @ values).transpose(1, 2)
    assert torch.allclose(attend(Map(q, k, None), values), expected, atol=1e-5)
    with torch.enable_grad():
        traced = attend(Map(q.requires_grad_(), k, None), values)
    assert traced.requires_grad
    assert torch.allclose(traced, expected, atol=1e-5)


@pytest.mark.parametrize("own_rows", [False, True])
def test_a_row_that_sees_nothing_is_zero_in_shared_attention_too(own_rows: bool) -> None:
    """As in torch's attention; NaN of the operands is not hidden by it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 16).unbind()
    mask = torch.zeros(2, HEADS, TOKENS if own_rows else 1, TOKENS)
    mask[0, :, 0] = -math.inf
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    actual = attend(Map(q, k, mask), v)
    assert torch.equal(actual[0, : 1 if own_rows else TOKENS].count_nonzero(), torch.tensor(0))
    torch.testing.assert_close(actual, expected)
    q[1, 0, 3, 2] = math.nan
    assert bool(attend(Map(q, k, mask), v)[1, 3, 0].isnan().all())


def test_foreign_attention_is_refused() -> None:
    attention, _ = make()
    with pytest.raises(RecipeError, match=r"blocks\.3: its attention \(SharedAttention\) cannot be shared"):
        check_attention("blocks.3", attention)


def count_flops(attention: Attention, x: torch.Tensor, *, share: bool) -> int:
    counter = FlopCounterMode(display=False)
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with kernel, counter, branches.joint() if share else branches.single():
        attention(x)
    return counter.get_total_flops()


def test_operations_of_the_unconditional_half_are_gone() -> None:
    attention, _ = make()
    x = inputs()
    projection, product = 2 * TOKENS * CHANNELS**2, 2 * TOKENS**2 * CHANNELS
    assert count_flops(attention, x, share=False) == 8 * projection + 4 * product
    assert count_flops(attention, x, share=True) == 6 * projection + 3 * product


def quantize(attention: Attention, method: str, time: TimeContext) -> InputQuantizer:
    """to_q, to_k and to_v by quantized linears with one input quantizer, as a conversion installs them."""
    torch.manual_seed(2)
    rows = torch.randn(256, CHANNELS)
    rule = make_recipe(method).rules[0]
    linears = {name: getattr(attention, name) for name in ("to_q", "to_k", "to_v")}
    weights = [linear.weight.detach() for linear in linears.values()]
    transform = fit_transform(rule.transforms, rows=rows, absmax=rows.abs().amax(0), weights=weights, seed=0)
    backend = dispatch.select_backend(torch.device("cpu"))
    quantizer = InputQuantizer([transform], InputGrid(rule.activation), time=time, backend=backend, readers=3)
    for index, (name, linear) in enumerate(linears.items()):
        weight = quantize_weight(transform.apply_to_weight(linear.weight.detach()), rule.weight)
        layer = QuantizedLinear([weight], linear.bias, quantizer, owns_input=index == 0)
        setattr(attention, name, layer)
    return quantizer


@pytest.mark.parametrize("method", ["rtn", "tr-dq"])
def test_quantized_siblings_quantize_once_and_multiply_only_what_is_needed(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, shared = make()
    quantizer = quantize(attention, method, shared.time)
    x = inputs(2)
    reference = expected(attention, x)
    plain = attention(x)
    quantized, multiplied = [], []
    originals = dispatch.quantize_activation, dispatch.linear

    def quantize_spy(x: torch.Tensor, *rest: object, **named: object) -> object:
        quantized.append(x.numel() // CHANNELS)
        return originals[0](x, *rest, **named)

    def linear_spy(activation: object, *rest: object, **named: object) -> object:
        multiplied.append(len(activation.values))
        return originals[1](activation, *rest, **named)

    monkeypatch.setattr(dispatch, "quantize_activation", quantize_spy)
    monkeypatch.setattr(dispatch, "linear", linear_spy)
    with branches.joint():
        y = attention(x)
    assert quantized == [4 * TOKENS], "the transform runs once, over both halves"
    assert multiplied == [4 * TOKENS, 2 * TOKENS, 2 * TOKENS], "values for both halves, queries and keys for one"
    assert torch.allclose(y, reference, atol=1e-5)
    assert quantizer._last is None
    assert torch.equal(attention(x), plain), "what the siblings remember is not disturbed"
    with branches.two_calls() as step:
        with step.call("conditional"):
            conditional = attention(x[2:])
        with step.call("unconditional"):
            unconditional = attention(x[:2])
    assert torch.allclose(torch.cat([unconditional, conditional]), y, atol=1e-6)
    assert quantizer._last is None
