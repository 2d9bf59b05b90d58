"""Prompts of a pipeline as embeddings: encoded as its own call would encode them, or handed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trdq_core.adapters.families import CALL_SETTINGS
from trdq_core.adapters.stock_call import encode
from trdq_core.adapters.stock_run import StockRun
from trdq_core.errors import ModelError, TRDQError
from trdq_core.sampling import Conditioning

_LIBRARY_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, ImportError)


class Prompts:
    """Conditionings by prompt. Each prompt is encoded once and kept."""

    def __init__(self, run: StockRun, model: str, device: torch.device, dtype: torch.dtype) -> None:
        self._run, self._model, self._device, self._dtype = run, model, device, dtype
        self._known: dict[str, Conditioning] = {}

    def provide(self, prompt: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the embeddings of a prompt, by the names of the pipeline's call; ModelError for names it does not have."""
        unknown = sorted(set(tensors) - set(self._run.taken))
        if unknown or not tensors:
            names = [name for name in self._run.taken if "embeds" in name or name == "class_labels"]
            raise ModelError(
                f"model {self._model}: got embeddings called {', '.join(unknown) or 'nothing'}; the names are those of its "
                f"pipeline's call, such as {', '.join(names)[:160]}."
            )
        self._known[prompt] = Conditioning(
            prompt,
            {
                name: one.to(self._device, self._dtype if one.is_floating_point() else None)
                for name, one in tensors.items()
            },
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """The prompts as the pipeline's own call would encode them, with the empty one for guidance."""
        for prompt in prompts:
            if prompt not in self._known:
                self.provide(prompt, self._class_of(prompt) if self._run.by_class else self._embeddings(prompt))
        return [self._known[prompt] for prompt in prompts]

    def any(self) -> Conditioning:
        """Some conditioning, for calls in which it does not matter which."""
        if not self._known:
            self.encode(["0" if self._run.by_class else ""])
        return next(iter(self._known.values()))

    def noise(self) -> Conditioning:
        """A conditioning of noise in the shape of a known one: its branches differ whatever the prompts are."""
        generator = torch.Generator().manual_seed(0)
        known = self.any()
        drawn = {
            name: torch.randn(one.shape, generator=generator).to(one) if one.is_floating_point() else one
            for name, one in known.tensors.items()
        }
        return Conditioning(known.prompt, drawn)

    def _class_of(self, prompt: str) -> dict[str, Tensor]:
        """The class that a prompt names, by number or by label."""
        labels = getattr(self._run.pipeline, "labels", None) or {}
        count = int(self._run.pipeline.transformer.config.get("num_embeds_ada_norm") or 1000)
        number = int(prompt) if prompt.strip().isdigit() else labels.get(prompt.strip(), -1)
        if not 0 <= number < count:
            raise ModelError(
                f"model {self._model}: it draws one of {count} classes, and {prompt!r} names none; give a class number from 0 "
                f"to {count - 1}{' or one of its labels' if labels else ''}."
            )
        return {"class_labels": torch.tensor([number])}

    def _embeddings(self, prompt: str) -> dict[str, Tensor]:
        pipeline = self._run.pipeline
        encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
        if all(getattr(pipeline, name, None) is None for name in encoders):
            raise ModelError(
                f"model {self._model}: it was saved without its text encoder, so {prompt!r} cannot be encoded; save the "
                "pipeline with it, or hand over embeddings with provide(prompt, tensors)."
            )
        settings = {**CALL_SETTINGS, "prompt": prompt, "negative_prompt": "", "device": self._device}
        with one_sentence(f"model {self._model}: {prompt!r} could not be encoded"):
            held = encode(pipeline, settings)
        return {name: _stacked(value) for name, value in held.items() if isinstance(value, (Tensor, list, tuple))}


def _stacked(value: Tensor | Sequence[Tensor]) -> Tensor:
    """Embeddings as one tensor; pipelines that take a list of them are handed one again."""
    return value if isinstance(value, Tensor) else torch.stack(list(value))


@contextmanager
def one_sentence(what: str, advice: str = "choose another model or update diffusers") -> Iterator[None]:
    """Errors of the libraries as a ModelError of one sentence."""
    try:
        yield
    except TRDQError:
        raise
    except _LIBRARY_ERRORS as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{what} ({reason}); {advice}.") from error
