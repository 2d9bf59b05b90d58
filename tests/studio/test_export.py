"""Saving a model from the page: the run that is asked for, its command line, its words."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from studio.services.export import export_command, export_spec, export_words, export_work
from studio.services.form import Form, compare_spec
from tests.studio.fake_core import FakeCore
from trdq_core.arguments import build_parser, spec_from
from trdq_core.errors import ModelError, RecipeError


def test_one_column_is_saved_in_the_run_folder_and_nowhere_else(form: Form) -> None:
    spec = compare_spec(dataclasses.replace(form, steps=4))
    chosen = next(recipe for recipe in spec.recipes if recipe.quantized)
    asked = export_spec(dataclasses.replace(spec, save_to="/etc", push_to_hub="a/b"), chosen.name)
    assert (asked.command, asked.recipes, asked.save_to, asked.push_to_hub) == ("save", (chosen,), None, None)
    assert asked.calibration_prompts == spec.calibration_prompts
    assert asked.prompts == spec.prompts[:1]


def test_the_reference_and_unknown_columns_are_refused(core: FakeCore, form: Form) -> None:
    spec = compare_spec(form)
    for name in ("fp", "fp-again", "../x", ""):
        with pytest.raises(RecipeError, match="choose another column"):
            export_spec(spec, name)
    chosen = next(recipe for recipe in spec.recipes if recipe.quantized)
    with pytest.raises(ModelError):
        export_work(core, dataclasses.replace(spec, model="/etc"), chosen.name)


def test_the_command_line_asks_for_the_same_run(form: Form) -> None:
    spec = compare_spec(dataclasses.replace(form, steps=4))
    chosen = next(recipe for recipe in spec.recipes if recipe.storage != "shared")
    words = shlex.split(export_command(spec, chosen.name))
    assert words[:3] == ["python", "-m", "trdq_core"]
    asked = spec_from(vars(build_parser().parse_args(words[3:])))
    ours = export_spec(spec, chosen.name)
    same = {"save_to": None, "prompts": ()}
    assert dataclasses.replace(asked, **same) == dataclasses.replace(ours, **same)
    assert Path(asked.save_to or "").name == "FOLDER"
    assert "--recipe-file 'my recipe.json'" in export_command(spec, chosen.name, Path("my recipe.json"))


@pytest.mark.parametrize(("equal", "words"), [(True, "the same bits"), (False, "NOT"), (None, "not loaded again")])
def test_the_words_say_whether_it_came_back(equal: bool | None, words: str) -> None:
    saved = {"folder": "/runs/x/model", "bytes": 3 << 20, "denoiser_bytes": 1 << 20, "fp_denoiser_bytes": 4 << 20}
    text = export_words({"saved": {**saved, "bit_equal": equal}})
    assert "Saved in /runs/x/model: 3.0 MiB, the denoiser 1.0 MiB, 25% of full precision." in text
    assert words in text
