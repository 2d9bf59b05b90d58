"""Runs: one command with everything it needs, as a run folder holds it in `spec.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from trdq_core.errors import RecipeError
from trdq_core.specs.base import Spec
from trdq_core.specs.recipe import Recipe, SharingSpec

Command = Literal["calibrate", "sample", "compare", "profile", "attention", "evaluate", "sensitivity", "save"]


Precision = Literal["auto", "fp32", "fp16", "bf16"]
Offload = Literal["none", "model", "sequential"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "fp16", "bf16")
OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")


class Loading(NamedTuple):
    """How a model is loaded: in which precision, and what of it waits in the machine's memory while others use the GPU.

    "auto" is FP32 on a CPU, and on a GPU the half precision that the model was published in. What is offloaded are text
    encoders and autoencoder, whole ("model") or layer by layer ("sequential"); the denoiser, which is measured, stays.
    """

    dtype: Precision = "auto"
    offload: Offload = "none"


DEFAULT_LOADING = Loading()


def fused_name(model: str, lora: str | Path | None) -> str:
    """What a model is called once a LoRA was added to it: what is measured on it is not of the model alone."""
    return model if lora is None else f"{model}+{Path(lora).stem}"


@dataclass(frozen=True, kw_only=True)
class RunSpec(Spec):
    """One run of the command line or of a studio page. The folder of a run holds it as `spec.json`."""

    command: Command
    model: str
    recipes: tuple[Recipe, ...] = ()
    prompts: tuple[str, ...] = ()
    calibration_prompts: tuple[str, ...] = ()
    steps: int = 20
    guidance: float = 3.5
    seed: int = 0
    timing_rounds: int = 10
    backend: Literal["reference", "torch", "cpp", "triton"] | None = None  # None: the fastest that runs here
    sharing: SharingSpec | None = None  # of the attention command: the threshold and time groups to plan with
    seeds: int = 1  # of evaluate: pictures of each prompt, from seed, seed + 1000 and so on
    trace: str | None = None  # of profile: the file that gets a Chrome trace of one step
    save_to: str | None = None  # of save: the folder to write; None: "model" in the run folder
    push_to_hub: str | None = None  # of save: OWNER/NAME to upload it to
    bits: tuple[str, ...] = ()  # of sensitivity: "W4A8" and so on, each tried on every layer alone
    height: int | None = None  # in pixels; None: what the pipeline makes by itself
    width: int | None = None
    frames: int | None = None
    dtype: Precision = "auto"  # of the full-precision model; see Loading
    offload: Offload = "none"
    lora: str | None = None  # a safetensors file that is added to the weights, times lora_scale, before anything else
    lora_scale: float = 1.0
    anyway: bool = False  # load the model even where the memory check says that it does not fit

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 200:
            raise RecipeError(f"steps: got {self.steps}; allowed is 2 to 200.")
        if not 1 <= self.guidance <= 30:
            raise RecipeError(f"guidance: got {self.guidance}; allowed is 1 (off) to 30.")
        if not 0 <= self.seed < 2**31:
            raise RecipeError(f"seed: got {self.seed}; allowed is 0 to {2**31 - 1}.")
        if not 1 <= self.timing_rounds <= 1000:
            raise RecipeError(f"timing_rounds: got {self.timing_rounds}; allowed is 1 to 1000.")
        if not 1 <= self.seeds <= 100:
            raise RecipeError(f"seeds: got {self.seeds}; allowed is 1 to 100.")
        for name, value in self.size.items():
            if not 1 <= value <= 8192:
                raise RecipeError(f"{name}: got {value}; allowed is 1 to 8192.")
        if not math.isfinite(self.lora_scale):
            raise RecipeError(f"lora_scale: got {self.lora_scale}; give a number, 1 adds the LoRA as it was trained.")
        if self.lora is None and self.lora_scale != 1:
            raise RecipeError(f"lora_scale: got {self.lora_scale:g} and no LoRA; name its file with --lora.")
        if self.command == "attention" and self.guidance == 1:
            raise RecipeError("guidance: got 1, which has one branch; give more than 1 to compare two branches.")
        for prompt in (*self.prompts, *self.calibration_prompts):
            check_prompt(prompt)
        self._check_recipes()

    def _check_recipes(self) -> None:
        """Each recipe has a name of its own, also where a file system takes capitals for small letters."""
        names = [recipe.name.lower() for recipe in self.recipes]
        for recipe in self.recipes:
            if names.count(recipe.name.lower()) > 1:
                raise RecipeError(
                    f"recipes: {recipe.name} is named twice; each recipe of a run needs a name of its own."
                )
            if (groups := recipe.time.groups_in(self.steps)) > self.steps:
                raise RecipeError(
                    f"groups: got {groups} timestep groups for {self.steps} steps in {recipe.name}; "
                    "use at most as many groups as steps."
                )

    @property
    def loading(self) -> Loading:
        """How the model is to be loaded."""
        return Loading(self.dtype, self.offload)

    @property
    def size(self) -> dict[str, int]:
        """Height and width in pixels and frames, as far as they are asked for."""
        asked = {"height": self.height, "width": self.width, "frames": self.frames}
        return {name: value for name, value in asked.items() if value is not None}


MAX_PROMPT = 500


def check_prompt(prompt: str) -> str:
    """`prompt` without surrounding blanks; RecipeError if it is empty or too long."""
    text = prompt.strip()
    if not text:
        raise RecipeError("prompt: it is empty; write what the picture should show, such as red apple.")
    if len(text) > MAX_PROMPT:
        raise RecipeError(f"prompt: got {len(text):,} characters; allowed are at most {MAX_PROMPT}, shorten it.")
    return text
