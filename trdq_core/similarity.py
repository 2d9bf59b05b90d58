"""How alike the two guidance branches attend, measured while the full-precision model samples; and plans made from it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trdq_core import branches
from trdq_core.errors import CalibrationError, RecipeError, StorageError
from trdq_core.events import OnEvent, Progress, ignore
from trdq_core.nn.attention import Map, Projections, additive_mask, check_attention, map_blocks
from trdq_core.nn.modules import share_copy
from trdq_core.sampling import SampledModel, sample
from trdq_core.sharing import attention_flops, self_attentions
from trdq_core.specs import SharingMeasure, SharingSpec
from trdq_core.timegroups import TimeContext, TimeGroups

FORMAT_VERSION = 1
FILES = ("similarity.safetensors", "similarity.json")


class Gap(NamedTuple):
    """How far the branches are apart in one attention call, as sums (heads,) from which the measures follow."""

    dot: Tensor  # of the two maps, over all rows and columns
    conditional: Tensor  # squared norm of the conditional map
    unconditional: Tensor  # the same of the other
    error: Tensor  # squared norm of A_c V_u - A_u V_u
    output: Tensor  # squared norm of A_u V_u

    def map_cosine(self) -> Tensor:
        """Cosine similarity of the flattened maps, (heads,)."""
        return self.dot / (self.conditional * self.unconditional).sqrt()

    def output_error(self) -> Tensor:
        """||A_c V_u - A_u V_u|| / ||A_u V_u||, (heads,)."""
        return (self.error / self.output).sqrt()

    def block_error(self) -> Tensor:
        """The same over all heads together, ()."""
        return (self.error.sum() / self.output.sum()).sqrt()


@torch.no_grad()
def measure_gap(conditional: Map, unconditional: Map, values: Tensor) -> Gap:
    """The gap of one call from both maps (batch, heads, tokens, width) and the unconditional values.

    Goes by row blocks of one head: two blocks of scores are in memory at a time, never a whole map.
    """
    heads = values.shape[1]
    sums = torch.zeros(5, heads, dtype=torch.float64)
    pairs = zip(map_blocks(conditional), map_blocks(unconditional), strict=True)
    for (item, head, _, own), (_, _, _, other) in pairs:
        value = values[item, head].float()
        expected = other @ value
        parts = (own * other, own.square(), other.square(), (own @ value - expected).square(), expected.square())
        sums[:, head] += torch.stack([part.sum() for part in parts]).double().cpu()
    return Gap(*sums)


class MeasuringAttention:
    """A processor that computes what the one it replaced computes and, beside it, the gap between the branches.

    Works on both branches in one batch and on two calls in either order: the first waits in the step's store.
    """

    def __init__(self, plain: Callable[..., Tensor], time: TimeContext) -> None:
        self.plain, self.time = plain, time
        self.seen: dict[float, list[Gap]] = {}
        self.tokens = 0

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The plain output (batch, tokens, channels)."""
        step = branches.present()
        if step.branch != "single" and encoder_hidden_states is None:
            mask = additive_mask(attn, attention_mask, hidden_states)
            self._measure(attn, hidden_states, mask, step)
        return self.plain(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, temb=temb
        )

    def _measure(self, attn: nn.Module, x: Tensor, mask: Tensor | None, step: branches.GuidedStep) -> None:
        projections = Projections(attn, x)
        values, source = projections.heads("to_v"), projections.map(mask)
        if step.branch == "joint":
            half = len(x) // 2
            first, second = (
                Map(*(None if part is None else part[rows] for part in source))
                for rows in (slice(None, half), slice(half, None))
            )
            self._add(measure_gap(second, first, values[:half]), x.shape[1])
            return
        other = "unconditional" if step.branch == "conditional" else "conditional"
        waiting = step.kept.pop((self, other), None)
        if waiting is None:
            step.kept[self, step.branch] = (source, values)
        elif step.branch == "unconditional":
            self._add(measure_gap(waiting[0], source, values), x.shape[1])
        else:
            self._add(measure_gap(source, *waiting), x.shape[1])

    def _add(self, gap: Gap, tokens: int) -> None:
        self.seen.setdefault(self.time.timestep, []).append(gap)
        self.tokens = tokens


@dataclass(frozen=True)
class Similarity:
    """The measures over timesteps, blocks and heads: means over prompts, fp32."""

    timesteps: tuple[float, ...]  # as sampled, largest first
    map_cosine: Tensor  # (timesteps, blocks, heads)
    output_error: Tensor  # (timesteps, blocks, heads)
    block_error: Tensor  # (timesteps, blocks), the output error of all heads together
    about: Mapping[str, Any]  # model, prompts, steps, guidance, seed, tokens, channels, blocks

    def save(self, folder: Path) -> None:
        """Write similarity.safetensors and similarity.json."""
        tensors = {name: getattr(self, name).contiguous() for name in ("map_cosine", "output_error", "block_error")}
        about = {"format_version": FORMAT_VERSION, "timesteps": self.timesteps, **self.about}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "similarity.tmp")
            (folder / "similarity.tmp").replace(folder / FILES[0])
            (folder / FILES[1]).write_text(json.dumps(about, indent=1))
        except (OSError, SafetensorError) as error:
            raise StorageError(f"similarity: could not write {folder.name} ({error}); free some disk space.") from error

    @classmethod
    def load(cls, folder: Path) -> Similarity:
        """Read the two files; CalibrationError if they are missing, damaged or newer."""
        try:
            about = json.loads((folder / FILES[1]).read_text())
            if about["format_version"] > FORMAT_VERSION:
                raise CalibrationError(
                    f"similarity {folder.name}: format {about['format_version']} is newer than {FORMAT_VERSION}, "
                    "update TR-DQ Studio."
                )
            return cls(tuple(about["timesteps"]), **load_file(folder / FILES[0]), about=about)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(f"similarity {folder.name}: damaged ({error}); measure it again.") from error


def measure_similarity(
    model: SampledModel,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] | None = None,
) -> Similarity:
    """Sample every prompt in full precision and compare both branches' self-attention in every block and step.

    The pictures are those of plain sampling: the measures are computed beside it.
    """
    if not prompts or guidance <= 1:
        raise CalibrationError(
            "similarity: it takes at least one prompt and a guidance above 1, else there is one branch."
        )
    started = time.monotonic()
    denoiser, context = share_copy(model.denoiser), TimeContext(TimeGroups())
    context.attach(denoiser, model.timestep_argument)
    processors = []
    for name in self_attentions(model.linears()):
        attention = denoiser.get_submodule(name)
        check_attention(name, attention)
        processors.append(MeasuringAttention(attention.processor, context))
        attention.set_processor(processors[-1])
    progress = Progress("attention", len(prompts) * steps, on_event=on_event, cancelled=cancelled)
    with model.using(denoiser):
        for index, conditioning in enumerate(model.encode(prompts)):
            sample(
                model, conditioning, seed + index, steps=steps, guidance=guidance,
                on_step=lambda step, timestep, latents, c=conditioning: progress.advance(c.prompt),
            )  # fmt: skip
    about = {
        "model": model.name, "prompts": list(prompts), "steps": steps, "guidance": guidance, "seed": seed,
        "blocks": self_attentions(model.linears()), "tokens": processors[0].tokens,
        "channels": next(layer.in_features for layer in model.linears() if layer.role == "self_q"),
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip
    return _collect(processors, about)


def _collect(processors: Sequence[MeasuringAttention], about: Mapping[str, Any]) -> Similarity:
    timesteps = tuple(processors[0].seen)

    def mean(measure: Callable[[Gap], Tensor]) -> Tensor:
        cells = [
            [torch.stack([measure(gap) for gap in processor.seen[t]]).mean(0) for processor in processors]
            for t in timesteps
        ]
        return torch.stack([torch.stack(row) for row in cells]).float()

    return Similarity(timesteps, mean(Gap.map_cosine), mean(Gap.output_error), mean(Gap.block_error), about)


def plan_sharing(
    similarity: Similarity,
    groups: TimeGroups,
    *,
    threshold: float | None = None,
    measure: SharingMeasure = "output_error",
    saving: float | None = None,
) -> SharingSpec:
    """The blocks to share in each time group: those within `threshold` at every step of the group, or, with a budget
    `saving` (share of the attention FLOPs), those of least error until it is reached.

    The threshold is a greatest output error, or a least mean cosine of the maps. The plan says what it saves and costs.
    """
    if (threshold is None) == (saving is None):
        raise RecipeError("sharing plan: give a threshold or a saving to reach, one of the two.")
    steps_of = [[i for i, t in enumerate(similarity.timesteps) if groups.group_of(t) == g] for g in range(groups.count)]
    count = similarity.block_error.shape[1]
    score = similarity.block_error if measure == "output_error" else 1 - similarity.map_cosine.mean(-1)
    cells = sorted(
        (float(score[steps, block].max()), group, block)
        for group, steps in enumerate(steps_of) if steps for block in range(count)
    )  # fmt: skip
    if threshold is not None:
        limit = threshold if measure == "output_error" else 1 - threshold
        chosen = [(group, block) for worst, group, block in cells if worst <= limit]
    else:
        chosen, reached = [], 0.0
        whole, saved = attention_flops(similarity.about["tokens"], similarity.about["channels"])
        for _, group, block in cells:
            if reached >= saving - 1e-9:
                break
            chosen.append((group, block))
            reached += len(steps_of[group]) * saved / (whole * count * len(similarity.timesteps))
    blocks = tuple(tuple(sorted(b for g, b in chosen if g == group)) for group in range(groups.count))
    spec = SharingSpec(
        blocks=blocks, edges=groups.edges, measure=measure if threshold is not None else None, threshold=threshold
    )
    return predict(similarity, spec)


def predict(similarity: Similarity, spec: SharingSpec) -> SharingSpec:
    """`spec` with the errors and the saving that the measures foretell for it."""
    groups = TimeGroups(spec.edges)
    errors = [
        float(similarity.block_error[step, block])
        for step, timestep in enumerate(similarity.timesteps)
        for block in (spec.blocks[groups.group_of(timestep)] if spec.blocks else ())
    ]
    whole, saved = attention_flops(similarity.about["tokens"], similarity.about["channels"])
    return dataclasses.replace(
        spec,
        predicted_error=sum(errors) / len(errors) if errors else 0.0,
        worst_error=max(errors, default=0.0),
        predicted_saving=len(errors) * saved / (whole * similarity.block_error.numel()),
    )
