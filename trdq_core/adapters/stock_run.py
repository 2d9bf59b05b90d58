"""Running a pipeline's stock call: with which arguments, from which latents, watched step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from trdq_core.adapters.families import CALL_SETTINGS
from trdq_core.adapters.stock_call import Halt, parameters_of, replaced, starting_from, undisturbed
from trdq_core.sampling import Conditioning

_SIZES = {"height": "height", "width": "width", "num_frames": "frames", "video_length": "frames"}


class StockRun:
    """Runs of one pipeline. `size` holds height and width in pixels and frames, where they are not the pipeline's own."""

    def __init__(self, pipeline: DiffusionPipeline, size: Mapping[str, int]) -> None:
        self.pipeline, self.size = pipeline, dict(size)
        self.taken = parameters_of(type(pipeline).__call__)
        self._config = pipeline.transformer.config
        self._under_way = False

    @property
    def sizes_taken(self) -> tuple[str, ...]:
        """Which of height, width and frames the pipeline's call takes."""
        return tuple(dict.fromkeys(key for name, key in _SIZES.items() if name in self.taken))

    @property
    def by_class(self) -> bool:
        """Whether it draws classes and takes no text."""
        return "class_labels" in self.taken

    @property
    def embeds_guidance(self) -> bool:
        """Whether the strength of the guidance is an input of the transformer."""
        return bool(self._config.get("guidance_embeds"))

    @property
    def guidance_name(self) -> str:
        """The setting that strengthens guidance: that of the embedded guidance where the transformer has one."""
        return "true_cfg_scale" if "true_cfg_scale" in self.taken and not self.embeds_guidance else "guidance_scale"

    def __call__(
        self,
        conditioning: Conditioning,
        latents: Tensor | None,
        *,
        steps: int,
        guidance: float,
        on_step: Callable[[int, float, Tensor], object] = lambda *seen: None,
        seed: int = 0,
        output: str = "latent",
    ) -> Any:
        """Run the stock call from `latents` or from those it draws itself, and return the last ones; or what it returns
        where `output` asks for pictures. `on_step` may run it again, to show a picture of what there is.
        """
        seen: list[Tensor] = []

        def after(step: int, timestep: Any, value: Tensor) -> None:
            seen.append(value)
            on_step(step, float(timestep), value)
            if output == "latent" and len(seen) == steps and not self._has_callback:
                raise Halt  # what follows decodes

        arguments = self.arguments(conditioning, steps, guidance)
        arguments |= {"generator": torch.Generator().manual_seed(seed), "output_type": output}
        with ExitStack() as stack:
            if self._under_way:
                stack.enter_context(undisturbed(self.pipeline))
            stack.enter_context(replaced(self, "_under_way", True))
            if latents is not None:
                stack.enter_context(starting_from(self.pipeline, latents))
            arguments |= stack.enter_context(self._watching(after, halves=2 if guidance > 1 else 1))
            try:
                result = self.pipeline(**{name: value for name, value in arguments.items() if name in self.taken})
            except Halt:
                if not seen or output != "latent":
                    raise
        return seen[-1] if output == "latent" else result[0]

    @property
    def _has_callback(self) -> bool:
        return "callback_on_step_end" in self.taken or "callback" in self.taken

    @contextmanager
    def _watching(self, after: Callable[[int, Any, Tensor], None], halves: int) -> Iterator[dict[str, Any]]:
        """Let `after` see the latents of every step: by the pipeline's callback, else from its scheduler, where loops that
        carry both guidance branches along have `halves` of them."""
        if "callback_on_step_end" in self.taken:

            def at_end(pipeline: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
                after(step, timestep, values["latents"])
                return {}

            yield {"callback_on_step_end": at_end, "callback_on_step_end_tensor_inputs": ["latents"]}
        elif "callback" in self.taken:
            yield {"callback": after, "callback_steps": 1}
        else:
            count = 0

            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                answer = before(*args, **kwargs)
                value = answer[0] if isinstance(answer, tuple) else answer.prev_sample
                after(count, args[1], value.chunk(halves)[0])
                count += 1
                return answer

            with replaced(self.pipeline.scheduler, "step", step) as before:
                yield {}

    def arguments(self, conditioning: Conditioning, steps: int, guidance: float) -> dict[str, Any]:
        """Arguments of the stock call, more than any one pipeline takes."""
        # Pipelines with guidance of their own take the other branch as a wish for it; the rest want both in any case.
        both = "true_cfg_scale" not in self.taken or (guidance > 1 and not self.embeds_guidance)
        given = {name: one for name, one in conditioning.tensors.items() if both or not name.startswith("negative_")}
        if self.by_class:
            given = {"class_labels": given["class_labels"].tolist()}
        listed = {name: list(value.unbind(0)) for name, value in given.items() if self._takes_list(name)}
        sizes = {name: self.size[key] for name, key in _SIZES.items() if key in self.size}
        arguments = {**CALL_SETTINGS, **self._native_size(), **sizes, **given, **listed}
        return {**arguments, "num_inference_steps": steps, self.guidance_name: guidance}

    def _takes_list(self, name: str) -> bool:
        """Whether the pipeline wants one tensor an item, as its annotations say."""
        return str(self.taken[name].annotation).lower().startswith("list[torch") if name in self.taken else False

    def _native_size(self) -> dict[str, int]:
        """The size the transformer was made for, where the pipeline's default is another model's."""
        side, scale = self._config.get("sample_size"), getattr(self.pipeline, "vae_scale_factor", None)
        default = self.taken["height"].default if "height" in self.taken else None
        if not isinstance(side, int) or not isinstance(scale, int) or default is None:
            return {}
        return {"height": side * scale, "width": side * scale}
