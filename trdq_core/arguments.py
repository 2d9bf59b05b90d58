"""What the command line takes: its flags, and the `RunSpec` that flags and `--spec spec.json` end in. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trdq_core import __version__
from trdq_core.bitwidths import DEFAULT_BITS, at_bits, parse_bits, with_each_of
from trdq_core.errors import RecipeError, StorageError
from trdq_core.group_flags import add_group_flags, grouping_of, keep_groups
from trdq_core.model_flags import (
    add_activations_command,
    add_anyway,
    add_download_command,
    add_loading,
    add_lora,
    add_model_flags,
    add_models_command,
    add_runs_command,
    add_size,
)
from trdq_core.presets import METHODS, OFFERED_BITS, parse_recipe, with_sharing
from trdq_core.prompts import CALIBRATION_PROMPTS, FALLBACK_PROMPTS, stored_prompts
from trdq_core.prompts import PROMPTS_FILE as PROMPTS_FILE
from trdq_core.sharing_flags import add_sharing_flags, sharing_wish
from trdq_core.specs import Recipe, RunSpec, SharingSpec

BACKENDS = ("reference", "torch", "cpp", "triton")
DEFAULT_MODEL = "pocket-image"
DEFAULT_RECIPES = {
    "plan": "tr-dq-w4a8",
    "calibrate": "",
    "sample": "fp",
    "compare": "fp,rtn-w4a8,tr-dq-w4a8",
    "profile": "fp,rtn-w8a8",
    "attention": "",
    "evaluate": "rtn,tr-dq",
    "sensitivity": "",
    "activations": "tr-dq-w4a8",
    "save": "tr-dq-w4a8",
}
WITHOUT_A_RUN = ("plan", "activations")  # commands that only look, so their RunSpec names no prompts
DEFAULT_PROMPTS = {"attention": 4, "sample": 1, "compare": 8, "profile": 1, "evaluate": 16, "sensitivity": 2, "save": 1}
SENSITIVITY_BITS = ("W8A8", "W4A8", "W4A4", "W3A4")
RUN_FIELDS = (
    "model", "steps", "guidance", "seed", "timing_rounds", "backend", "seeds", "anyway", "push_to_hub", "trace",
    "height", "width", "frames", "dtype", "offload", "lora", "lora_scale",
)  # fmt: skip

Given = dict[str, Any]  # the flags that were typed, nothing else


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one sentence instead of a usage screen."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="trdq", description="Quantize a diffusion transformer after training, and see what it did.")
    parser.add_argument("--version", action="version", version=f"trdq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    for one in (add_models_command(commands), add_download_command(commands), add_runs_command(commands)):
        _add_json(one)
    summary = "list the other tools that recipes can be compared with"
    _add_json(commands.add_parser("peers", help=summary, description=summary, argument_default=argparse.SUPPRESS))

    for command, summary in (
        ("plan", "show which layer gets which kernel and how many bytes, before anything runs"),
        ("calibrate", "sample in full precision and store the statistics; fit recipes if any are given"),
        ("sample", "make pictures with one recipe"),
        ("compare", "make the same pictures with several recipes and measure the difference"),
        ("profile", "measure the time of a step and the memory of recipes"),
        (
            "evaluate",
            "measure many recipes on many pictures, in batches; started again it goes on where it was stopped",
        ),
        ("save", "quantize with one recipe and write a folder that diffusers loads, with a model card"),
    ):
        one = commands.add_parser(command, help=summary, description=summary, argument_default=argparse.SUPPRESS)
        _add_model_and_recipes(one, command)
        _add_steps(one)
        if command != "plan":
            _add_run(one, command)
        else:
            add_loading(one)
        _add_json(one)
    _add_attention(commands)
    _add_sensitivity(commands)
    _add_budget(commands)
    activations = add_activations_command(commands)
    _add_model_and_recipes(activations, "activations")
    _add_steps(activations)
    _add_json(activations)
    _add_clean(commands)
    return parser


def _add_attention(commands: Any) -> None:
    summary = "measure how alike the two guidance branches attend, and plan which blocks may share"
    one = commands.add_parser("attention", help=summary, description=summary, argument_default=argparse.SUPPRESS)
    add = one.add_argument
    add("--spec", metavar="FILE", help="a spec.json to start from; flags given beside it win")
    add_model_flags(one, DEFAULT_MODEL)
    add_sharing_flags(one)
    _add_steps(one)
    _add_run(one, "attention")
    _add_json(one)


def _add_sensitivity(commands: Any) -> None:
    summary = "measure what each layer's bits cost when it alone is quantized"
    one = commands.add_parser("sensitivity", help=summary, description=summary, argument_default=argparse.SUPPRESS)
    add = one.add_argument
    add("--spec", metavar="FILE", help="a spec.json to start from; flags given beside it win")
    add_model_flags(one, DEFAULT_MODEL)
    add("--method", metavar="NAME", help="how each layer is quantized: a recipe's name without bits (default rtn)")
    add(
        "--recipe-file",
        metavar="FILE",
        help="a recipe.json in place of --method: its rules and time groups, at each of --bits",
    )
    add("--bits", metavar="A,B", help=f"bit-widths to try (default {','.join(SENSITIVITY_BITS)})")
    add_group_flags(one)
    _add_steps(one)
    _add_run(one, "sensitivity")
    _add_json(one)


def _add_budget(commands: Any) -> None:
    summary = "choose each layer's bits within a number of bytes, from a sensitivity table"
    one = commands.add_parser("budget", help=summary, description=summary, argument_default=argparse.SUPPRESS)
    add = one.add_argument
    add("--sensitivity", metavar="FILE", required=True, help="sensitivity.json, or the folder of a sensitivity run")
    add("--bytes", metavar="X", required=True, help="bytes, 3.2MB, 3MiB, or a share of the layers in FP32 such as 0.2")
    add("--packed", action="store_true", help="count tightly packed codes, as in a file, instead of bytes in memory")
    add(
        "--error",
        choices=("denoiser", "layer"),
        help="which error to add up: of the denoiser (default) or each layer's own",
    )
    add("--out", metavar="FILE", help="the recipe file to write; compare and evaluate take it as --recipe-file")
    _add_json(one)


def _add_clean(commands: Any) -> None:
    summary = "remove old switched sets and learnt rounding from the data folder; runs, calibrations and recipes stay"
    one = commands.add_parser("clean", help=summary, description=summary, argument_default=argparse.SUPPRESS)
    one.add_argument(
        "--older-than", type=float, metavar="DAYS", required=True, help="days since they were last written"
    )
    one.add_argument("--dry-run", action="store_true", help="only list them")
    _add_json(one)


def _add_model_and_recipes(parser: Parser, command: str) -> None:
    names = f"{', '.join(METHODS)}, with bits such as {OFFERED_BITS[2].lower()}"
    add = parser.add_argument
    add("--spec", metavar="FILE", help="a spec.json to start from; flags given beside it win")
    add_model_flags(parser, DEFAULT_MODEL)
    default = f" (default {DEFAULT_RECIPES[command]})" if DEFAULT_RECIPES[command] else ""
    add(
        "--recipes",
        "--recipe",
        metavar="A,B",
        help=f"recipes by name: {names}; fp is the full-precision reference; peer-NAME is another tool, see the peers "
        f"command{default}",
    )
    add(
        "--recipe-file",
        metavar="FILE",
        action="append",
        help="a recipe.json to add to the recipes; may be given again",
    )
    add_group_flags(parser)
    add("--backend", choices=BACKENDS, help="kernels to use or fail (default: the fastest that run here)")


def _add_steps(parser: Parser) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help=f"sampler steps (default {RunSpec.steps})")


def _add_run(parser: Parser, command: str) -> None:
    add = parser.add_argument
    add("--guidance", type=float, metavar="G", help=f"guidance scale, 1 is off (default {RunSpec.guidance})")
    add("--seed", type=int, metavar="N", help=f"seed of the first latent (default {RunSpec.seed})")
    add(
        "--calibration-prompts",
        type=int,
        metavar="N",
        help=f"prompts to calibrate on (default {CALIBRATION_PROMPTS})",
    )
    if command != "calibrate":
        which = parser.add_mutually_exclusive_group()
        count = DEFAULT_PROMPTS[command]
        which.add_argument("--prompts", type=int, metavar="N", help=f"the first N evaluation prompts (default {count})")
        which.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt of your own; may be given again")
    if command in ("compare", "profile"):
        add(
            "--timing-rounds",
            type=int,
            metavar="N",
            help=f"timed forward passes (default {RunSpec.timing_rounds})",
        )
    if command == "profile":
        add("--trace", metavar="FILE", help="write one step of each recipe as a Chrome trace, its name in the file's")
    if command == "evaluate":
        add("--seeds", type=int, metavar="N", help=f"pictures of each prompt (default {RunSpec.seeds})")
        add("--bits", metavar="A,B", help=f"for recipes named without bits (default {','.join(DEFAULT_BITS)})")
    if command in ("sample", "compare", "profile", "evaluate"):
        add(
            "--sharing",
            metavar="FILE",
            help="a plan.json of the attention command; sample shares by it, the others add each recipe with it",
        )
    add_size(parser)
    add_loading(parser)
    add_lora(parser)
    add_anyway(parser)
    if command == "save":
        add("--out", metavar="FOLDER", help='the model\'s new folder (default: "model" in the run folder)')
        add("--push-to-hub", metavar="ID", help="upload it as OWNER/NAME afterwards")
    else:
        add("--out", metavar="DIR", help="the run folder to write (default: a new one in the data folder)")
    add("--quiet", action="store_true", help="no progress on the terminal")


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on standard output instead of a table")


def spec_from(given: Given) -> RunSpec:
    """The run that flags and spec file ask for together; a typed flag wins over the file. A plan has no prompts."""
    command, from_file = given["command"], "spec" in given
    data: dict[str, Any] = {"model": DEFAULT_MODEL}
    if from_file:
        data = RunSpec.from_json(_read(given["spec"], "--spec")).to_dict()
    data["command"] = "calibrate" if command in WITHOUT_A_RUN else command
    data |= {name: given[name] for name in RUN_FIELDS if name in given}
    if "lora" in given:
        data["lora"] = str(Path(given["lora"]).absolute())
    if command == "save" and "out" in given:
        data["save_to"] = str(Path(given["out"]).absolute())
    if command == "attention":
        data |= {"recipes": [], **sharing_wish(given, from_file)}
        return RunSpec.from_dict(data | _prompt_fields(given, command, data["model"], from_file))
    if command == "sensitivity":
        data |= _layer_bits(given, from_file)
        return RunSpec.from_dict(data | _prompt_fields(given, command, data["model"], from_file))
    recipes = _shared(given, _recipes(given, default="" if from_file else DEFAULT_RECIPES[command]))
    if recipes or not from_file:
        data["recipes"] = [recipe.to_dict() for recipe in recipes]
    else:
        keep_groups(given, "--spec", "name recipes with --recipes as well")
    if command not in WITHOUT_A_RUN:
        data |= _prompt_fields(given, command, data["model"], from_file)
    return RunSpec.from_dict(data)


def _prompt_fields(given: Given, command: str, model: str, from_file: bool) -> dict[str, list[str]]:
    """The prompts to measure and to calibrate on, as far as the flags or the defaults decide them."""
    fields = {}
    if "prompt" in given:
        fields["prompts"] = given["prompt"]
    elif "prompts" in given or (command in DEFAULT_PROMPTS and not from_file):
        # Bits are chosen by what sensitivity measures, so it keeps off the prompts that results are measured on.
        which = "calibration" if command == "sensitivity" else "evaluation"
        fields["prompts"] = _prompts(model, which, given.get("prompts", DEFAULT_PROMPTS.get(command)), "--prompts")
    if "calibration_prompts" in given or not from_file:
        count = given.get("calibration_prompts", CALIBRATION_PROMPTS)
        fields["calibration_prompts"] = _prompts(model, "calibration", count, "--calibration-prompts")
    return fields


def _recipes(given: Given, *, default: str) -> list[Recipe]:
    """The recipes named by flags and files, each once; the default where none is."""
    files = given.get("recipe_file", [])
    names = given.get("recipes", "" if files else default)
    named = names.split(",") if names or "recipes" in given else []
    if given["command"] == "evaluate":
        named = with_each_of(named, parse_bits(given.get("bits", ",".join(DEFAULT_BITS)), "--bits"))
    grouping = grouping_of(given)
    found = [parse_recipe(name, **grouping) for name in named]
    found += [Recipe.from_json(_read(file, "--recipe-file")) for file in files]
    _check_twice([*(name.strip() for name in named), *files], found)
    return found


def _check_twice(given: Sequence[str], found: Sequence[Recipe]) -> None:
    """RecipeError where two words name one recipe, with both as they were written: one may be an alias."""
    written: dict[str, str] = {}
    for word, recipe in zip(given, found, strict=True):
        before = written.setdefault(recipe.name, word)
        if before != word:
            raise RecipeError(
                f"recipes: {before} and {word} are both {recipe.name}; each recipe of a run needs a name of its own, leave "
                "one out."
            )


def _layer_bits(given: Given, from_file: bool) -> dict[str, Any]:
    """The bit-widths of a sensitivity run and the recipe of each; a spec file's stay if no flag names others."""
    if from_file and not {"bits", "method", "recipe_file"} & set(given):
        keep_groups(given, "--spec", "name recipes with --method as well")
        return {}
    bits = parse_bits(given.get("bits", ",".join(SENSITIVITY_BITS)), "--bits")
    if file := given.get("recipe_file"):
        if "method" in given:
            raise RecipeError(
                "--method: got it beside --recipe-file, which says how each layer is quantized; leave one out."
            )
        keep_groups(given, "--recipe-file", "leave it out, or change the file")
        mine = Recipe.from_json(_read(file, "--recipe-file"))
        return {"bits": list(bits), "recipes": [at_bits(mine, label).to_dict() for label in bits]}
    method, grouping = given.get("method", "rtn"), grouping_of(given)
    if method in ("fp", "") or with_each_of([method], ("W8A8",)) == [method]:
        raise RecipeError(f"--method: got {method!r}; give a method that quantizes, without bits, such as rtn.")
    return {"bits": list(bits), "recipes": [parse_recipe(f"{method}-{label}", **grouping).to_dict() for label in bits]}


def _shared(given: Given, recipes: list[Recipe]) -> list[Recipe]:
    """The recipes with the plan of --sharing: sample shares, the other commands show each recipe without and with it."""
    if "sharing" not in given:
        return recipes
    if not recipes:
        raise RecipeError(
            "--sharing: the recipes of --spec keep their own sharing; name recipes with --recipes as well."
        )
    sharing = SharingSpec.from_json(_read(given["sharing"], "--sharing"))
    if given["command"] == "sample":
        return [with_sharing(recipe, sharing) for recipe in recipes]
    return [
        both
        for recipe in recipes
        for both in ((recipe, with_sharing(recipe, sharing)) if recipe.peer is None else (recipe,))
    ]


def _prompts(model: str, which: str, count: int, flag: str) -> list[str]:
    """The first `count` prompts of one list for the model, or of a short built-in one if that is not there."""
    if count < 1:
        raise RecipeError(f"{flag}: got {count}; allowed is 1 or more.")
    try:
        stored = stored_prompts(model)[which]
    except (StorageError, KeyError):
        stored = FALLBACK_PROMPTS
        print(f"assets holds no {which} prompts for {model}; a short built-in list stands in.", file=sys.stderr)
    if count > len(stored):
        raise RecipeError(f"{flag}: got {count}; there are {len(stored)} {which} prompts, ask for at most that many.")
    return list(stored[:count])


def _read(file: str, flag: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{flag}: {file} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{flag}: {file} is not a text file; give the JSON file of a run or a recipe.") from error
