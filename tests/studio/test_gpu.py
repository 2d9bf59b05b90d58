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

import gradio
import pytest

from studio.jobs import Worker
from studio.services import gpu
from studio.services.work import prepare
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


def refused_by_the_lender(error: Exception) -> Callable[..., Iterator[Any]]:
    """A run whose GPU is not lent, or taken back after its first event."""

    def run(*arguments: Any) -> Iterator[Any]:
        yield {"kind": "stage", "stage": "load", "label": "Loading", "recipe": None}
        raise error

    return run


QUOTA = gradio.Error(
    "You have exceeded your free ZeroGPU quota (60s requested vs. 10s left). Try again in 1:00:00. ",
    title="ZeroGPU quota exceeded", print_exception=False,
)  # fmt: skip
CRASH = gradio.Error("KeyError", title="ZeroGPU worker error", print_exception=False)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (QUOTA, r"ZeroGPU quota exceeded: .*60s requested vs\. 10s left.*1:00:00; sign in, ask for fewer prompts"),
        (gradio.Error("GPU task aborted", title="ZeroGPU worker error"), "taken back .* fewer prompts or steps"),
        (CRASH, "was not foreseen"),
        (RuntimeError("ZeroGPU API /schedule error: 500"), "was not foreseen"),
    ],
)
def test_what_the_lender_says_is_a_sentence(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "run_events", refused_by_the_lender(error))
    events: list[Any] = []
    with pytest.raises(TRDQError, match=said) as told:
        gpu.run(SPEC, tmp_path / "one", events.append, lambda: False)
    assert len(events) == 1 and "Error" not in str(told.value)
    worker = Worker()
    job = worker.submit("a", "run", lambda say, cancelled: gpu.run(SPEC, tmp_path / "two", say, cancelled))
    job.wait_finished(5)
    assert (job.state, job.text) == ("failed", str(told.value))


def test_leaving_while_it_waits_is_a_cancellation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("Connection closed by visitor while queueing")
    monkeypatch.setattr(gpu, "run_events", refused_by_the_lender(error))
    with pytest.raises(Cancelled, match="left while it waited"):
        gpu.run(SPEC, tmp_path / "one", lambda event: None, lambda: False)


def test_the_time_asked_for_follows_the_models_size(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, stored = gpu._size_of("pocket-image")
    assert 9e6 < parameters < 12e6 and stored > 2 * parameters, "the text encoder and the decoder are read as well"
    linear = SimpleNamespace(in_features=30_000, out_features=20_000)
    monkeypatch.setattr("trdq_core.models.layers_of_model", lambda model: [linear])
    assert gpu._size_of("random-pixart-xl-28") == (600_000_000, 0)
    asked = RunSpec(**{**vars(SPEC), "steps": 20}).to_json()
    small = gpu.seconds_for(asked, "", "")
    monkeypatch.setattr(gpu, "_size_of", lambda model: (2_600_000_000, 0))
    large = gpu.seconds_for(asked, "", "")
    assert large - small >= 19, "4 pictures of 20 steps, a quarter of a second longer each"
    monkeypatch.setattr(gpu, "_size_of", lambda model: (0, 20 * 10**9))
    assert gpu.seconds_for(asked, "", "") >= small + 19, "20 GB are read first"


def test_a_stored_calibration_is_not_paid_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RunSpec(**{**vars(SPEC), "calibration_prompts": ("owl",) * 40, "steps": 20}).to_json()
    before = gpu.seconds_for(spec, "", "")
    monkeypatch.setattr("trdq_core.runs.find_calibration", lambda spec: "there")
    assert gpu.seconds_for(spec, "", "") < before


def test_the_time_asked_for_grows_with_the_run_and_has_bounds() -> None:
    def asked(**changes: Any) -> int:
        return gpu.seconds_for(RunSpec(**{**vars(SPEC), **changes}).to_json(), "", "")

    assert asked(prompts=("owl",) * 20, steps=20) > asked()
    assert asked(prompts=("owl",) * 200, steps=200) == gpu.MOST_SECONDS
    assert asked(recipes=()) >= gpu.LEAST_SECONDS


def test_the_first_calibration_is_made_on_the_lent_gpu(lent: dict[str, Any], core: FakeCore) -> None:
    job = prepare(core, Worker())
    assert job is not None
    job.wait_finished(20)
    assert job.state == "done" and (job.result / "report.json").is_file()
    assert core.runs.calls == [], "it ran in this process, which has no GPU"


def test_without_a_quota_for_it_the_log_says_so(
    lent: dict[str, Any], core: FakeCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "run_events", refused_by_the_lender(QUOTA))
    job = prepare(core, Worker())
    assert job is not None
    job.wait_finished(20)
    assert job.state == "failed" and "quota exceeded" in job.text
    assert "first calibration of pocket-image was not done: ZeroGPU quota exceeded" in caplog.text
