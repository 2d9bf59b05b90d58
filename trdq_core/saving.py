"""Quantizing in Python, and the save command: a folder that diffusers loads, and the proof that it came back as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trdq_core.calibration import calibrate
from trdq_core.convert import Conversion, convert
from trdq_core.data_free import convert_without_data, needs_data
from trdq_core.errors import ModelError, RecipeError
from trdq_core.events import ignore
from trdq_core.folders import data_folder
from trdq_core.kernels import dispatch
from trdq_core.model_passes import make_passes
from trdq_core.models import load_model
from trdq_core.presets import parse_recipe
from trdq_core.sampling import SampledModel, Trajectory, sample
from trdq_core.session import Session
from trdq_core.specs import Recipe, fused_name

FOLDER = "model"  # inside the run folder, where no other place is named


def quantize(
    model: str | Path,
    recipe: str | Recipe,
    *,
    prompts: Sequence[str] = (),
    steps: int = 20,
    guidance: float = 3.5,
    seed: int = 0,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
) -> Any:
    """The diffusers pipeline of a model with its denoiser quantized, ready to sample and to be saved.

    `model` is a name that the models command lists, or a diffusers folder; `recipe` a name such as "tr-dq-w4a8". `prompts`
    are what a recipe that looks at activations is calibrated on; RecipeError if it needs some and there are none. `lora` is a
    safetensors file that is added to the weights first, times `lora_scale`; ModelError if it is not one for this model.
    """
    chosen = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    reason = needs_data(chosen)
    if reason is not None and not prompts:
        raise RecipeError(
            f"{chosen.name}: {reason}; give prompts to calibrate it on, sixteen or so that are like yours."
        )
    loaded = load_model(str(model))
    if lora is not None:
        add_lora(loaded, lora, lora_scale)
    backend, layers = dispatch.select_backend(loaded.device), loaded.linears()
    argument = loaded.timestep_argument
    if reason is None:
        convert_without_data(loaded.denoiser, layers, chosen, backend=backend, argument=argument)
        return getattr(loaded, "pipeline", loaded.denoiser)
    statistics = calibrate(loaded, list(prompts), steps=steps, guidance=guidance, seed=seed)
    passes = make_passes(
        loaded, statistics, chosen, folder=data_folder() / "reconstructions", seed=seed,
        announce=lambda stage, label: None, on_event=ignore, cancelled=None,
    )  # fmt: skip
    conversion = convert(
        loaded.denoiser, layers, chosen, statistics, backend=backend, storage_folder=data_folder() / "sets",
        argument=argument, seed=seed, passes=passes,
    )  # fmt: skip
    pipeline = getattr(loaded, "pipeline", None)
    if pipeline is None:
        return conversion.denoiser
    part = next(name for name, value in pipeline.components.items() if value is loaded.denoiser)
    setattr(pipeline, part, conversion.denoiser)
    return pipeline


def add_lora(model: SampledModel, file: str | Path, scale: float) -> None:
    """Add a LoRA to a loaded model's weights; ModelError says what does not fit."""
    if not hasattr(model, "fuse_lora"):
        raise ModelError(f"LoRA: {model.name} has random weights, so there is nothing to add it to.")
    model.fuse_lora(file, scale)


def recipe_to_save(recipes: Sequence[Recipe]) -> Recipe:
    """The one recipe of a save run; RecipeError for none, several, or the reference."""
    changed = [recipe for recipe in recipes if recipe.changes]
    if len(recipes) != 1 or not changed:
        raise RecipeError(
            f"save: got {', '.join(recipe.name for recipe in recipes) or 'no recipe'}; give one recipe that changes the "
            "model, such as tr-dq-w4a8."
        )
    return changed[0]


def target_of(session: Session) -> Path:
    """The folder that a save run writes."""
    return Path(session.spec.save_to) if session.spec.save_to else session.folder.path / FOLDER


def check(session: Session) -> Recipe:
    """The recipe of a save run; RecipeError or StorageError for what can be known to fail before hours of work."""
    from trdq_core.adapters.saving import check_target

    recipe = recipe_to_save(session.spec.recipes)
    check_target(target_of(session), session.spec.push_to_hub)
    return recipe


def save(
    session: Session, conversion: Conversion, report: Mapping[str, Any], runs: Sequence[Trajectory], picture: Any | None
) -> dict[str, Any]:
    """Write the folder and load it again: where it is, its bytes, and whether the first picture came back to the bit.

    `runs` are those sampled with the conversion. `bit_equal` is None where nothing was sampled, or kernels were asked for by
    name: a loaded model takes the fastest.
    """
    from trdq_core.adapters.saving import load_denoiser, save_quantized

    spec, model, folder = session.spec, session.model, target_of(session)
    session.stage("save", f"Saving {conversion.recipe.name}", conversion.recipe.name)
    pipeline = getattr(model, "pipeline", None)
    with model.using(conversion.denoiser):
        saved = save_quantized(
            pipeline if pipeline is not None else conversion,
            folder,
            name=fused_name(Path(spec.model).name, spec.lora),
            report=report,
            picture=picture,
            push_to_hub=spec.push_to_hub,
        )
    equal = None
    if runs and spec.backend is None:
        session.stage("check", "Loading it again and sampling the first prompt", conversion.recipe.name)
        equal = _same(session, load_denoiser(folder, type(conversion.denoiser)), runs[0])
    return {
        "folder": str(folder),
        "bytes": saved.nbytes,
        "denoiser_bytes": saved.denoiser_bytes,
        "fp_denoiser_bytes": sum(parameter.nbytes for parameter in model.denoiser.parameters()),
        "hub": spec.push_to_hub,
        "bit_equal": equal,
    }


def _same(session: Session, denoiser: nn.Module, run: Trajectory) -> bool:
    spec, model = session.spec, session.model
    with model.using(denoiser.to(model.device)):
        again = sample(model, session.conditionings[0], spec.seed, steps=spec.steps, guidance=spec.guidance)
    return torch.equal(again.latents[-1], run.latents[-1])
