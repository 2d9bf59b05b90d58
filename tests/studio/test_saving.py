"""Saving from the Compare page: its handlers, its archive, what is refused."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from studio.components import saving as component
from studio.context import Settings, Studio
from studio.pages import runs
from studio.pages.saving import _Handlers
from studio.services import archives, export
from studio.services.form import Form, compare_spec
from studio.services.stored import StoredRun, archive
from studio.services.work import run_work
from tests.studio.fake_core import FakeCore
from trdq_core.errors import RecipeError, StorageError
from trdq_core.presets import make_recipe, peer_recipe
from trdq_core.specs import RunSpec

MODELS = ("pocket-image", "pocket-video")


def visitor() -> Any:
    return SimpleNamespace(session_hash="a")


def handlers_of(studio: Studio) -> _Handlers:
    with gr.Blocks():
        return _Handlers(studio, component.build(), gr.HTML(), gr.HTML())


def compared(studio: Studio, spec: RunSpec) -> StoredRun:
    folder = run_work(studio.core, spec)(lambda event: None, lambda: False)
    run = studio.runs.open(folder.name)
    assert run is not None
    return run


@pytest.fixture
def spec(form: Form) -> RunSpec:
    return compare_spec(dataclasses.replace(form, steps=4))


@pytest.mark.parametrize("model", MODELS)
def test_a_column_is_saved_packed_and_offered_again(core: FakeCore, spec: RunSpec, model: str) -> None:
    studio = Studio.over(core, Settings(local=True))
    run = compared(studio, dataclasses.replace(spec, model=model))
    handlers = handlers_of(studio)
    part = handlers.part
    offered = handlers.offer(run.id)
    assert offered[part.recipe].choices == [("RTN W4A8", "rtn-w4a8"), ("TR-DQ W4A8", "tr-dq-w4a8")]
    assert offered[part.made] is None and not offered[part.pack].visible
    assert f"--model {model} --recipe tr-dq-w4a8" in offered[part.command].value
    last = list(handlers.save(visitor(), run.id, "tr-dq-w4a8"))[-1]
    assert core.runs.calls[-1].command == "save" and core.runs.calls[-1].save_to is None
    made = studio.runs.open(last[part.made])
    assert made is not None and f"Saved in {made.folder / 'model'}" in last[part.said]
    packed = list(handlers.pack(made.id))[-1]
    names = zipfile.ZipFile(packed[part.download].value["path"]).namelist()
    assert f"{model}-tr-dq-w4a8/model_index.json" in names
    again = handlers.offer(run.id)
    assert again[part.made] == made.id and again[part.pack].visible, "the same model is not made twice"
    assert handlers.choose(run.id, "rtn-w4a8")[part.made] is None
    assert handlers.choose(run.id, "../x") == {handlers.part.command: gr.skip()}, "gradio takes no empty answer"
    shown = handlers.offer(made.id)
    assert f"{made.folder / 'model'}" in runs.saved_words(made, local=True) and not runs.saved_words(run, local=True)
    assert shown[part.made] == made.id and "--spec" in shown[part.command].value
    assert not any("model/" in name for name in zipfile.ZipFile(archive(made)).namelist()), "the model has its own zip"


def test_what_cannot_be_saved_is_not_offered(core: FakeCore, studio: Studio, spec: RunSpec) -> None:
    run = compared(studio, spec)
    part = handlers_of(studio).part
    peer = dataclasses.replace(spec, recipes=(make_recipe("fp"), peer_recipe("torchao-int8")))
    assert export.export_names(dataclasses.replace(run, spec=peer)) == []
    assert export.export_names(dataclasses.replace(run, state="cancelled")) == []
    with pytest.raises(RecipeError, match="choose another column"):
        export.export_spec(peer, "peer-torchao-int8")
    hidden = handlers_of(studio).offer(None)
    assert [update.visible for update in hidden.values() if isinstance(update, gr.Column)] == [False]
    assert part.made.value is None


def test_cancel_and_failure_leave_nothing_to_fetch(core: FakeCore, studio: Studio, spec: RunSpec) -> None:
    run, handlers = compared(studio, spec), handlers_of(studio)
    core.runs.pace = 0.05
    steps = handlers.save(visitor(), run.id, "tr-dq-w4a8")
    next(steps), next(steps)
    studio.worker.cancel("a")
    last = list(steps)[-1]
    assert "cancelled" in last[handlers.strip] and handlers.part.made not in last
    for recipe, sentence in (("fp", "choose another column"), ("/etc", "choose another column")):
        with pytest.raises(gr.Error, match=sentence):
            list(handlers.save(visitor(), run.id, recipe))
    with pytest.raises(gr.Error, match="there is no run to save from"):
        list(handlers.save(visitor(), "../..", "tr-dq-w4a8"))


def test_a_large_model_is_not_packed(
    core: FakeCore, studio: Studio, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = compared(studio, export.export_spec(spec, "tr-dq-w4a8"))
    monkeypatch.setattr(archives, "LARGEST", 100)
    with pytest.raises(StorageError, match="are more than the") as told:
        export.export_archive(saved, local=False)
    assert str(saved.folder) not in str(told.value)
    with pytest.raises(StorageError, match=f"it lies in {saved.folder}"):
        export.export_archive(saved, local=True)
    handlers = handlers_of(studio)
    last = list(handlers.pack(saved.id))[-1]
    assert "are more than the" in last[handlers.part.said]
    assert "no saved model here any more" in list(handlers.pack("../x"))[-1][handlers.part.said]


def test_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    (folder / "b.json").symlink_to("/etc/hostname")
    assert zipfile.ZipFile(archives.pack("x", "m", [folder], "")).namelist() == ["m/a.json"]


@pytest.mark.parametrize("kind", ["uniform", "dp", "per_step", "edges"])
def test_the_command_has_the_time_groups(form: Form, kind: str) -> None:
    from trdq_core.arguments import build_parser, spec_from

    spec = compare_spec(dataclasses.replace(form, steps=4, group_kind=kind, groups=3, edges="250, 500"))
    line = export.export_command(spec, "tr-dq-w4a8")
    asked = spec_from(vars(build_parser().parse_args(line.split()[3:])))
    assert asked.recipes == export.export_spec(spec, "tr-dq-w4a8").recipes
