"""What is made of the text once a run: found for the same text alone, and gone with it."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.nn.test_fused import output, pixart, quantized
from tests.tiny import tiny_pipeline
from trdq_core.kernels import native
from trdq_core.nn.fused_block import fuse
from trdq_core.nn.modules import share_copy
from trdq_core.nn.remembered import Remembered


@pytest.fixture
def text() -> Tensor:
    return torch.randn(2, 5, 8)


def kept(text: Tensor, *parts: object) -> tuple[Remembered, Tensor]:
    memory, result = Remembered(), torch.randn(3)
    with torch.no_grad():
        memory.keep(text, 0, (result,), *parts)
    return memory, result


def test_a_fresh_view_of_the_same_text_is_the_same_text(text: Tensor) -> None:
    weight = object()
    memory, result = kept(text.view(2, -1, 8), weight)
    with torch.no_grad():
        found = memory.find(text.view(2, -1, 8), 0, weight)
        assert found is not None
        assert found[0] is result
        assert memory.find(text[:1], 0, weight) is None, "another part of it"
        assert memory.find(text.clone(), 0, weight) is None, "equal numbers somewhere else"
        assert memory.find(text, 1, weight) is None, "another time group"
        assert memory.find(text, 0, object()) is None, "another weight"


def test_writing_to_text_or_result_is_seen(text: Tensor) -> None:
    with torch.no_grad():
        memory, _ = kept(text)
        text.add_(1)
        assert memory.find(text, 0) is None
        memory, result = kept(text)
        result.mul_(2)
        assert memory.find(text, 0) is None


def test_nothing_outlives_the_text() -> None:
    text = torch.randn(4)
    memory, _ = kept(text)
    assert len(memory) == 1
    del text
    gc.collect()
    assert len(memory) == 0


def test_two_branches_are_kept_and_no_more() -> None:
    memory, texts = Remembered(), [torch.randn(4) for _ in range(3)]
    with torch.no_grad():
        for text in texts:
            memory.keep(text, 0, (text + 1,))
        assert memory.find(texts[0], 0) is None
        assert all(memory.find(text, 0) is not None for text in texts[1:])


def test_nothing_is_kept_where_it_could_not_be_checked(text: Tensor) -> None:
    memory = Remembered()
    memory.keep(text, 0, (text + 1,))
    assert len(memory) == 0, "with gradients, the graph would be kept"
    with torch.inference_mode():
        memory.keep(torch.randn(4), 0, (torch.randn(4),))
    assert len(memory) == 0, "inference tensors do not say whether they were written to"


def test_copies_start_empty(text: Tensor) -> None:
    memory, _ = kept(text)
    assert len(copy.deepcopy(memory)) == len(pickle.loads(pickle.dumps(memory))) == 0


class TestDenoiser:
    """The text side of a fused model."""

    @pytest.fixture(autouse=True)
    def _native(self) -> None:
        reason = native.unavailable_reason()
        if reason is not None:
            pytest.skip(reason)

    @staticmethod
    def counted(model: nn.Module) -> list[str]:
        """Names of text projections and calls of cross-attention's keys, as they happen."""
        seen: list[str] = []
        projection = model.caption_projection.forward
        inner = projection.plain
        projection.plain = lambda x: (seen.append("text"), inner(x))[1]
        for index, block in enumerate(model.transformer_blocks):
            quantizer = block.attn2.to_k.input_quantizer
            plain = quantizer.linears
            quantizer.linears = lambda *a, _p=plain, _i=index, **k: (seen.append(f"keys {_i}"), _p(*a, **k))[1]
        return seen

    def test_once_a_run(self) -> None:
        """A second step with other latents reads what the first made, and gives what a model that remembers nothing gives."""
        model, call = pixart()
        plain = quantized(model)
        fused, fresh = share_copy(plain), share_copy(plain)
        fuse(fused)
        seen = self.counted(fused)
        output(fused, call)
        assert seen == ["text", "keys 0", "keys 1"]
        later = call | {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([20, 20])}
        second = output(fused, later)
        assert len(seen) == 3
        fuse(fresh)
        assert torch.equal(second, output(fresh, later))

    def test_a_sampler_of_diffusers_computes_it_once(self) -> None:
        """The stock pipeline hands over one and the same text at each step."""
        pipeline = tiny_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.transformer = fused = quantized(pipeline.transformer)
        fuse(fused)
        seen = self.counted(fused)
        pipeline("red apple", num_inference_steps=3, output_type="latent", use_resolution_binning=False)
        assert seen == ["text", "keys 0", "keys 1"]

    def test_another_prompt_is_another_run(self) -> None:
        model, call = pixart()
        plain = quantized(model)
        fused, fresh = share_copy(plain), share_copy(plain)
        fuse(fused)
        output(fused, call)
        other = call | {"encoder_hidden_states": torch.randn(2, 5, 32)}
        result = output(fused, other)
        call["encoder_hidden_states"].copy_(other["encoder_hidden_states"])
        fuse(fresh)
        assert torch.equal(result, output(fresh, other))
        assert torch.equal(output(fused, call), result), "the first text was overwritten in place"

    def test_another_time_group_is_computed_anew(self) -> None:
        model, call = pixart()
        fused = quantized(model)
        fuse(fused)
        seen = self.counted(fused)
        output(fused, call)
        for quantizer in {block.attn2.to_k.input_quantizer for block in fused.transformer_blocks}:
            quantizer.refresh()
        output(fused, call)
        assert seen == ["text", "keys 0", "keys 1", "keys 0", "keys 1"]

    def test_weights_loaded_into_the_projection_count(self) -> None:
        model, call = pixart()
        fused = quantized(model)
        fuse(fused)
        before = output(fused, call)
        with torch.no_grad():
            for weight in fused.caption_projection.parameters():
                weight.mul_(1.5)
        assert not torch.equal(output(fused, call), before)
