"""Fetching models from the sidebar, what the sidebar says of memory, and comparisons by script."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from studio import app
from studio.context import Settings, Studio
from studio.pages import getting as page
from studio.services import api, getting, models
from studio.services.form import Form
from studio.services.work import prepare, run_work
from tests.studio.fake_core import FakeCore
from trdq_core.errors import ModelError, RecipeError, StorageError
from trdq_core.hub.known import KNOWN_MODELS


def test_the_closed_list_is_offered_with_its_revisions(core: FakeCore) -> None:
    offered = dict((name, label) for label, name in getting.choices(core))
    assert set(offered) == {model.name for model in KNOWN_MODELS}
    assert "revision b940f670" in getting.line("sd3.5-medium")
    assert "zai-org/CogView4-6B, revision 63a52b7f." in getting.line("cogview4")
    assert getting.line("nobody") == ""


@pytest.mark.parametrize(
    ("name", "typed", "allowed", "found"),
    [
        ("latte-1", "", False, "latte-1"),
        ("latte-1", " owner/name ", True, "owner/name"),
        ("latte-1", "", True, "latte-1"),
    ],
)
def test_what_is_asked_for(name: str, typed: str, allowed: bool, found: str) -> None:
    assert getting.asked(name, typed, allowed) == found


@pytest.mark.parametrize(
    ("name", "typed", "allowed", "sentence"),
    [
        ("latte-1", "owner/name", False, "--allow-hub"),
        ("../assets", "", False, "choose one of the list"),
        ("/etc/passwd", "", True, "choose one of the list"),
        ("latte-1", "../../etc", True, "owner/name"),
        (None, None, True, "choose one of the list"),
    ],
)
def test_what_is_refused(name: Any, typed: Any, allowed: bool, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        getting.asked(name, typed, allowed)


def test_the_command_is_that_of_the_page_and_never_holds_what_is_no_id() -> None:
    assert getting.command("latte-1") == "python -m trdq_core download latte-1"
    assert getting.command("latte-1", "owner/name") == "python -m trdq_core download owner/name"
    assert getting.command("latte-1", "a; rm -rf b") == ""


def handlers_of(core: FakeCore, settings: Settings) -> tuple[Any, Any]:
    """The handlers over widgets of their own."""
    studio = Studio.over(core, settings)
    with gr.Blocks():
        controls = app.sidebar.build(models.choices(core), getting.choices(core), allow_hub=settings.allow_hub)
        strip, problem = gr.HTML(), gr.HTML()
    return page._Handlers(studio, controls, controls.getting, strip, problem), controls


def visitor() -> Any:
    return SimpleNamespace(session_hash="a")


def test_a_download_ends_in_the_list(core: FakeCore) -> None:
    handlers, controls = handlers_of(core, Settings(allow_hub=True))
    last = list(handlers.download(visitor(), "latte-1", ""))[-1]
    assert "It can be chosen as a model now" in last[handlers.strip]
    assert last[controls.model].value == "pocket-image"
    list(handlers.download(visitor(), "latte-1", "owner/name"))
    assert core.runs.fetched == [("latte-1", False), ("owner/name", True)], "a typed id is asked for without a token"


def test_a_download_that_fails_says_why(core: FakeCore) -> None:
    handlers, _ = handlers_of(core, Settings())
    core.runs.break_with = StorageError("model x: 9.0 GB are to be fetched and 1.0 GB are free.")
    with pytest.raises(gr.Error, match="9.0 GB are to be fetched"):
        list(handlers.download(visitor(), "latte-1", ""))
    with pytest.raises(gr.Error, match="--allow-hub"):
        list(handlers.download(visitor(), "latte-1", "owner/name"))


def test_where_nothing_is_fetched_there_is_nothing_to_press(core: FakeCore) -> None:
    def ids(settings: Settings) -> set[str]:
        config = app.build(Studio.over(core, settings)).get_config_file()
        return {str(part["props"].get("elem_id")) for part in config["components"]}

    assert "get-download" in ids(Settings())
    assert not {"get-download", "get-name", "get-id"} & ids(Settings(downloads=False))


def test_the_sidebar_says_what_a_model_needs(core: FakeCore) -> None:
    core.runs.memory = SimpleNamespace(fits=True, sentence=lambda: "model x: needs about 1.0 GB.")
    assert '<p class="tr-small">Model x: needs about 1.0 GB.</p>' in models.line(core, "pocket-image")
    core.runs.memory = SimpleNamespace(fits=False, sentence=lambda: "model x: needs <b>")
    assert '<p class="tr-notice warning">Model x: needs &lt;b&gt;</p>' in models.line(core, "pocket-image")
    assert "needs" not in models.line(core, "foreign")


def test_a_script_gets_numbers_pictures_and_no_paths(core: FakeCore, tmp_path: Path) -> None:
    spec = api.comparison(core, "pocket-image", "rtn-w4a8, tr-dq-w4a8", "owl", Form(steps=4), 2)
    assert [recipe.name for recipe in spec.recipes] == ["fp", "rtn-w4a8", "tr-dq-w4a8"]
    assert spec.recipes[-1].time.count == 2
    folder = run_work(core, spec)(lambda event: None, lambda: False)
    run = Studio.over(core).runs.open(folder.name)
    assert run is not None
    found = api.result(run, "done", "")
    assert set(found["recipes"]) == set(found["pictures"]) == {"fp", "rtn-w4a8", "tr-dq-w4a8"}
    assert all(url.startswith("data:image/png;base64,") for url in found["pictures"].values())
    assert str(tmp_path) not in str(found)


@pytest.mark.parametrize(
    ("model", "recipes", "prompt", "steps", "groups", "sentence"),
    [
        ("/etc", "rtn-w4a8", "owl", 4, 1, "the models here are"),
        ("pocket-image", "", "owl", 4, 1, "name 1 to 6"),
        ("pocket-image", ",".join(f"rtn-w{bits}a8" for bits in range(1, 8)), "owl", 4, 1, "got 7; name 1 to 6"),
        ("pocket-image", "nobody-w4a8", "owl", 4, 1, "nobody"),
        ("pocket-image", "rtn-w4a8", " ", 4, 1, "prompt: it is empty"),
        ("pocket-image", "rtn-w4a8", "owl", "many", 1, "steps"),
        ("pocket-image", "rtn-w4a8", "owl", 4, 2.5, "groups"),
    ],
)
def test_a_script_is_refused_in_words(
    core: FakeCore, model: str, recipes: str, prompt: str, steps: Any, groups: Any, sentence: str
) -> None:
    with pytest.raises((ModelError, RecipeError), match=sentence):
        api.comparison(core, model, recipes, prompt, Form(steps=steps), groups)


def test_events_that_name_files_are_not_told() -> None:
    assert api.told({"kind": "folder", "folder": "/x"}) is None
    assert api.told({"kind": "image", "image": "/x"}) is None
    told = api.told({"kind": "progress", "stage": "sample", "done": 1, "total": 2})
    assert told is not None and (told["stage"], told["done"], told["total"]) == ("sample", 1, 2)


def test_the_first_calibration_is_made_once(core: FakeCore) -> None:
    studio = Studio.over(core)
    job = prepare(core, studio.worker)
    assert job is not None
    job.wait_finished(20)
    assert job.state == "done" and core.runs.calls[0].command == "calibrate" and not core.runs.calls[0].recipes
    assert prepare(core, studio.worker) is None
