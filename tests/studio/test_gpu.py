"""Runs on a GPU lent by the call: nothing changes elsewhere; there, a process of its own that tells by plain values."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from studio.services import gpu
from tests.studio.fake_core import FakeCore
from trdq_core.errors import Cancelled, TRDQError
from trdq_core.presets import make_recipe, parse_recipe
from trdq_core.specs import RunSpec

SPEC = RunSpec(
    command="compare",
    model="pocket-image",
    recipes=(make_recipe("fp"), parse_recipe("rtn-w4a8")),
    prompts=("owl",),
    steps=4,
)


def in_a_fork(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """What `spaces.GPU` does: the generator runs in a forked process, and what it yields is pickled."""

    def call(*arguments: Any) -> Iterator[Any]:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)

        def work() -> None:
            for value in function(*arguments):
                there.send_bytes(pickle.dumps(value))
            there.send_bytes(pickle.dumps(StopIteration))

        process = context.Process(target=work)
        process.start()
        while (value := pickle.loads(here.recv_bytes())) is not StopIteration:
            yield value
        process.join()

    return call


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A Space with a GPU that is lent; what the package was asked for."""
    asked: dict[str, Any] = {}

    def decorator(duration: Any) -> Any:
        asked["duration"] = duration
        return in_a_fork

    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=decorator))
    importlib.reload(gpu)
    yield asked
    monkeypatch.delenv("SPACES_ZERO_GPU")
    importlib.reload(gpu)


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    """The fake in the place of the core's runs."""
    found = FakeCore(tmp_path)
    monkeypatch.setattr("trdq_core.runs.run", found.runs.run)
    return found


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu.lent()
    assert gpu.run_events is gpu._run_events
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    monkeypatch.setitem(sys.modules, "spaces", None)  # the package is missing
    assert gpu.on_lent_gpu(gpu._run_events) is gpu._run_events


def test_a_run_in_a_fork_leaves_its_files_and_tells_what_happens(
    lent: dict[str, Any], core: FakeCore, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    gpu.run(SPEC, tmp_path / "runs" / "one", events.append, lambda: False)
    assert (tmp_path / "runs" / "one" / "report.json").is_file()
    assert core.runs.calls == [], "it ran in this process"
    assert {"stage", "progress", "result"} <= {event["kind"] for event in events}
    assert "raised" not in {event["kind"] for event in events}
    assert lent["duration"] is gpu.seconds_for


def test_cancelling_reaches_the_other_process(lent: dict[str, Any], core: FakeCore, tmp_path: Path) -> None:
    core.runs.pace = 0.2
    with pytest.raises(Cancelled):
        gpu.run(SPEC, tmp_path / "runs" / "one", lambda event: None, lambda: True)
    assert not list((tmp_path / "runs").glob("*.stop"))


@pytest.mark.parametrize(
    ("error", "said"), [(TRDQError("steps: too few."), "steps: too few"), (KeyError("x"), "was not foreseen")]
)
def test_what_goes_wrong_there_is_a_sentence_here(
    error: Exception, said: str, lent: dict[str, Any], core: FakeCore, tmp_path: Path
) -> None:
    core.runs.break_with = error
    with pytest.raises(TRDQError, match=said):
        gpu.run(SPEC, tmp_path / "runs" / "one", lambda event: None, lambda: False)


def test_the_time_asked_for_grows_with_the_run_and_has_bounds() -> None:
    def asked(**changes: Any) -> int:
        return gpu.seconds_for(RunSpec(**{**vars(SPEC), **changes}).to_json(), "", "")

    assert asked(prompts=("owl",) * 20, steps=20) > asked()
    assert asked(prompts=("owl",) * 200, steps=200) == gpu.MOST_SECONDS
    assert asked(recipes=()) >= gpu.LEAST_SECONDS
