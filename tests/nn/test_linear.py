"""The quantized linear: right numbers, shared inputs, bytes that shrink, dtypes that stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trdq_core.kernels import dispatch, packing
from trdq_core.nn.input_grid import InputGrid
from trdq_core.nn.input_quantizer import InputQuantizer
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.nn.modules import module_bytes
from trdq_core.numerics.affine import fake_quantize_tokens
from trdq_core.presets import make_recipe
from trdq_core.timegroups import TimeContext, TimeGroups
from trdq_core.transforms.fit import fit_transform
from trdq_core.weights.rounding import dequantize_weight, quantize_weight

BACKENDS = [dispatch.select_backend(torch.device("cpu")), "torch", "reference"]


def make(
    method: str = "tr-dq", weight_bits: int = 4, activation_bits: int = 8, sets: int = 1, backend: str = "torch"
) -> tuple[QuantizedLinear, nn.Linear, torch.Tensor, list, list, TimeContext]:
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 96), torch.randn(2, 10, 128)
    x[..., 5] *= 20
    rule = make_recipe(method, weight_bits=weight_bits, activation_bits=activation_bits).rules[0]
    rows = x.flatten(0, 1)
    transforms = [
        fit_transform(rule.transforms, rows=rows, absmax=rows.abs().amax(0), weights=[linear.weight.detach()], seed=i)
        for i in range(sets)
    ]
    weights = [quantize_weight(t.apply_to_weight(linear.weight.detach()), rule.weight) for t in transforms]
    time = TimeContext(TimeGroups((500.0,)) if sets > 1 else TimeGroups())
    quantizer = InputQuantizer(transforms, InputGrid(rule.activation), time=time, backend=backend)
    layer = QuantizedLinear(weights, linear.bias, quantizer, owns_input=True)
    return layer, linear, x, transforms, weights, time


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "vidit-q", "tr-dq"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (6, 6), (4, 8), (4, 4)])
def test_the_layer_computes_what_fake_quantization_says(
    method: str, weight_bits: int, activation_bits: int, backend: str
) -> None:
    layer, linear, x, (transform,), (weight,), _ = make(method, weight_bits, activation_bits, backend=backend)
    seen = fake_quantize_tokens(transform.apply(x.double()), bits=activation_bits, symmetric=False)
    expected = seen @ dequantize_weight(weight).T + linear.bias.double()
    # Values at a rounding tie may fall to either side: one level of one channel.
    level = seen.abs().amax() / 2 ** (activation_bits - 1) * dequantize_weight(weight).abs().amax()
    assert (layer(x).double() - expected).abs().max() <= 2 * level


@torch.no_grad()
def test_invariant_32_each_group_uses_its_own_set_and_only_that() -> None:
    layer, _, x, transforms, weights, time = make(sets=2)
    for group, timestep in ((0, 100.0), (1, 900.0)):
        time.set(timestep)
        seen = fake_quantize_tokens(transforms[group].apply(x), bits=8, symmetric=False)
        expected = seen @ dequantize_weight(weights[group]).float().T + layer.bias
        assert torch.allclose(layer(x), expected, atol=2e-2)
    time.set(900.0)
    before = layer(x)
    layer.qweight[0].zero_()
    assert torch.equal(layer(x), before)
    time.set(100.0)
    assert not torch.equal(layer(x), before)


@torch.no_grad()
def test_siblings_transform_their_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, linear, x, _, weights, _ = make()
    quantizer = layer.input_quantizer
    quantizer.readers = 3
    siblings = [QuantizedLinear([weights[0]], linear.bias, quantizer, owns_input=False) for _ in range(2)]
    calls = []
    original = dispatch.quantize_activation
    monkeypatch.setattr(dispatch, "quantize_activation", lambda *a, **k: calls.append(1) or original(*a, **k))
    first = layer(x)
    assert torch.equal(siblings[0](x), first)
    assert torch.equal(siblings[1](x), first)
    assert len(calls) == 1
    assert quantizer._last is None, "the last reader must let go of the quantized activation"
    layer(x)
    x.mul_(2)  # changed in place: the remembered result is stale
    assert not torch.equal(siblings[0](x), first)
    assert len(calls) == 3
    assert "input_quantizer.rotation" in dict(layer.named_buffers())
    assert not any("input_quantizer" in name for name, _ in siblings[0].named_buffers())


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["rtn", "tr-dq"])
@pytest.mark.parametrize("shape", [(20,), (2, 2, 5), (1, 5, 2, 2), (20, 1)])
def test_inputs_of_any_number_of_dimensions_give_the_same_rows(
    shape: tuple[int, ...], method: str, backend: str
) -> None:
    layer, _, x, *_ = make(method, backend=backend)
    expected = layer(x).flatten(0, 1)
    y = layer(x.reshape(*shape, 128))
    assert y.shape == (*shape, 96) and torch.equal(y.flatten(0, -2), expected)
    strided = x.reshape(*shape, 128).transpose(0, -2)
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_weights_really_shrink() -> None:
    for bits, share in ((8, 0.30), (4, 0.18)):
        layer, linear, *_ = make("rtn", weight_bits=bits)
        assert module_bytes(layer) - layer.bias.nbytes <= share * linear.weight.nbytes * 1.34  # 96 outputs pad to 128


@torch.no_grad()
def test_scales_stay_fp32_when_the_model_is_cast() -> None:
    layer, _, x, *_ = make()
    expected = layer(x)
    layer.half()
    assert layer.weight_scale.dtype is torch.float32
    assert layer.input_quantizer.rotation.dtype is torch.float16
    assert layer.input_quantizer.permutation.dtype is torch.int32
    assert torch.equal(layer(x), expected)
    assert layer(x.half()).dtype is torch.float16


@torch.no_grad()
def test_invariant_10_state_survives_saving_bit_for_bit() -> None:
    layer, _, x, *_ = make()
    other, *_ = make()
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(layer.state_dict())
    other.refresh()
    other.input_quantizer.refresh()
    assert torch.equal(other(x), layer(x))


def test_the_layer_names_its_kernel() -> None:
    assert "_int_mm" in make(backend="torch")[0].kernel or "float32" in make(backend="torch")[0].kernel
    assert "reference" in make(backend="reference")[0].kernel
    assert "W4" in repr(make()[0])


@torch.no_grad()
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_a_layer_that_changes_its_kernels_lays_its_weight_out_for_them(
    weight_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Panels for a CPU, rows for a GPU, there and back; what is saved is panels from either."""
    layer, *_ = make(weight_bits=weight_bits, sets=2)
    panels, quantizer = layer.qweight.clone(), layer.input_quantizer
    before = layer.packed_weight()
    monkeypatch.setattr(InputQuantizer, "fit_backend", lambda self, device: None)
    quantizer.backend = "triton"  # as on a GPU after a move
    layer.fit_backend()
    rows = layer.packed_weight()
    assert rows is not before
    assert rows.data.shape[0] == layer.out_features
    assert torch.equal(packing.unpack_weight(rows), packing.unpack_weight(before))
    assert torch.equal(layer.laid_out(layer.qweight, panels=True), panels)
    assert layer.laid_out(layer.qweight) is layer.qweight
    quantizer.backend = "cpp"
    layer.fit_backend()
    assert torch.equal(layer.qweight, panels)
