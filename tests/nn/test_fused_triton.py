"""Fused blocks over the Triton kernels: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.triton_device import DEVICE
from tests.nn.test_fused import MODELS, dit, off, output, quantized
from trdq_core.kernels import triton_gpu, triton_launch
from trdq_core.nn.fused_block import fuse
from trdq_core.nn.modules import share_copy


@pytest.fixture(autouse=True)
def _triton() -> None:
    reason = triton_gpu.unavailable_reason(DEVICE)
    if reason is not None:
        pytest.skip(reason)


def on_device(model: nn.Module, call: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model quantized for Triton and its call, floats in `dtype`; scales and biases of quantized layers stay float32."""
    model = quantized(model, backend="triton")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DEVICE, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            whole = buffer is not None and buffer.is_floating_point() and not hasattr(module, "input_quantizer")
            keep = not whole or hasattr(module, "grid")
            module._buffers[name] = buffer.to(DEVICE) if keep else buffer.to(DEVICE, dtype)
    moved = {
        name: part.to(DEVICE, dtype if part.is_floating_point() else part.dtype) if isinstance(part, Tensor) else part
        for name, part in call.items()
    }
    return model, moved


@pytest.mark.parametrize(
    ("name", "dtype"), [("dit", torch.float32), ("dit", torch.bfloat16), ("pixart", torch.float32)]
)
def test_fused_blocks_compute_what_stock_blocks_do(name: str, dtype: torch.dtype) -> None:
    """Self-attention, masked cross-attention and feed-forward; in bfloat16 both are off by its rounding."""
    plain, call = on_device(*MODELS[name](), dtype)
    fused = share_copy(plain)
    assert fuse(fused) == {"attentions": {"dit": 2, "pixart": 4}[name], "feed_forwards": 2, "blocks": 2}
    expected, actual = output(plain, call), output(fused, call)
    assert actual.dtype is dtype
    assert off(actual.float(), expected.float()) < (2e-3 if dtype is torch.float32 else 3e-2)


def test_a_fused_step_is_passes_products_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v share one pass; no GELU and no layer norm of the blocks is left to torch, attention is."""
    model, call = on_device(*dit(), torch.float32)
    fuse(model)
    seen: list[str] = []
    original = triton_launch.quantize_rows
    monkeypatch.setattr(triton_launch, "quantize_rows", lambda *a: (seen.append(a[-1].kind), original(*a))[1])
    for name in ("gelu", "scaled_dot_product_attention"):
        torchs = getattr(nn.functional, name)
        monkeypatch.setattr(nn.functional, name, lambda *a, _f=torchs, _n=name, **k: (seen.append(_n), _f(*a, **k))[1])
    output(model, call)
    block = ["layer_norm", "scaled_dot_product_attention", "plain", "layer_norm", "gelu"]
    assert seen[: len(block)] == block
    assert seen.count("gelu") == 2
    assert seen.count("layer_norm") == 4


def test_a_moved_model_is_fused_where_its_kernels_fuse() -> None:
    """The kernels may change with the device; those that do not fuse get the stock block."""
    model, call = on_device(*dit(), torch.float32)
    fused = share_copy(model)
    fuse(fused)
    block = fused.transformer_blocks[0]
    seen: list[str] = []
    block.forward.plain = lambda *args, **kwargs: (seen.append("plain"), args[0])[1]
    x = torch.zeros(2, 9, 48, device=DEVICE)
    around = {"timestep": call["timestep"], "class_labels": call["class_labels"]}
    with torch.no_grad():
        block(x, **around)
        assert not seen
        for module in fused.modules():
            if hasattr(module, "grid"):
                module.backend = "torch"
        block(x, **around)
    assert seen == ["plain"]
