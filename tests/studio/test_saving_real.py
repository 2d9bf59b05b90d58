"""A column of a comparison saved over the real core, packed, unpacked and loaded by diffusers."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from studio.context import Studio
from studio.services.core import InstalledCore
from studio.services.export import export_archive, export_spec, export_words, export_work, saved_before, saved_folder
from trdq_core import models
from trdq_core.nn.linear import QuantizedLinear
from trdq_core.presets import parse_recipe
from trdq_core.specs import RunSpec


@pytest.mark.parametrize(("model", "folder"), [("pocket-image", "tiny_folder"), ("pocket-video", "tiny_video_folder")])
def test_what_the_page_hands_out_is_a_quantized_pipeline(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, folder: str
) -> None:
    monkeypatch.setattr(models, "ASSETS", tmp_path / "assets")
    shutil.copytree(request.getfixturevalue(folder), tmp_path / "assets" / model)
    spec = RunSpec(
        command="compare", model=model, recipes=(parse_recipe("fp"), parse_recipe("rtn-w4a8")), steps=2,
        prompts=("owl", "whale"), calibration_prompts=("red apple",),
    )  # fmt: skip
    studio = Studio.over(InstalledCore())
    made = export_work(studio.core, spec, "rtn-w4a8")(lambda event: None, lambda: False)
    run = studio.runs.open(made.name)
    assert run is not None and run.spec == export_spec(spec, "rtn-w4a8"), "so that it is found again"
    assert saved_folder(run) == made / "model"
    assert saved_before(studio.runs, run, "rtn-w4a8") is run
    assert "it samples the same bits" in export_words(run.report, local=False)
    zipfile.ZipFile(export_archive(run, local=False)).extractall(tmp_path / "fetched")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "fetched" / f"{model}-rtn-w4a8")
    layers = [one for one in pipeline.transformer.modules() if isinstance(one, QuantizedLinear)]
    plan = studio.plans.plan_of(model, spec.recipes[1], spec.steps)
    assert len(layers) == sum(layer.action == "quantize" for layer in plan.layers) > 0
